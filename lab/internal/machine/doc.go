// SPDX-License-Identifier: Apache-2.0

// Package machine runs programs in namespaces of their own (mount, network, PID, UTS,
// IPC, cgroup), as if on another machine that shares this one's kernel and files. It
// needs root on Linux.
//
// Three processes share the work:
//
//	this process --> guard --> init --> what runs on the machine
//
// The init is the first process of the PID namespace. It mounts, and it starts what
// [Machine.Start] asks for. When it ends, the kernel ends every process of the
// machine, and with them the mounts, the interfaces and the namespaces. Control
// groups and files stay, and only a process outside can remove them. This is the
// guard. It notices when this process ends, also if it is killed. If the guard is
// killed, the kernel kills the init too; the next machine then removes the empty
// control groups.
//
// Guard and init are this program again. They run before its main function, so no
// program has to know about them.
package machine
