// SPDX-License-Identifier: Apache-2.0

// Package module is what the tests of command mutants try.
package module
