// SPDX-License-Identifier: Apache-2.0

//go:build unix && !linux

package process

import "syscall"

// dieWithParent does nothing: only Linux can kill a child when its parent ends.
func dieWithParent(*syscall.SysProcAttr) {}
