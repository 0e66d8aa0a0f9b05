// SPDX-License-Identifier: Apache-2.0

package process

import "syscall"

// dieWithParent makes the kernel kill the child when its parent ends.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
