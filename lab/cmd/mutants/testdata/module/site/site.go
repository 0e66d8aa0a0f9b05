// SPDX-License-Identifier: Apache-2.0

// Package site uses package gate.
package site

import "example.com/module/gate"

// Next returns the number behind n.
func Next(n int) int { return gate.Unused(n) }
