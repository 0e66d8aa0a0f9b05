// SPDX-License-Identifier: Apache-2.0

package tailnet

// For conn_test.go, which is in a package of its own: it uses proxytest, which imports
// this one.
var (
	TailnetConn = tailnetConn
	Embedded    = embedded
)
