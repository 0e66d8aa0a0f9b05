// SPDX-License-Identifier: Apache-2.0

// Package node runs a real Kubernetes node: kubelet, containerd and runc, with
// kube-proxy, kube-controller-manager and kube-scheduler beside them. They run in
// namespaces of their own (see package machine), and nothing of them stays when the
// node stops or when the process that started it is killed.
//
// The API server runs outside. It reaches the node and its pods by their addresses,
// and they reach it at [Node.Host]. There is no other network: pods have no way out
// of this machine, and no DNS.
//
// Where no node can run, [Unavailable] says why.
package node
