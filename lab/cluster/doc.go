// SPDX-License-Identifier: Apache-2.0

// Package cluster runs a Kubernetes cluster: the real etcd and kube-apiserver, started
// through envtest, and one node. So authentication, RBAC, the audit log and everything
// that an API server streams through a kubelet are real.
//
// The node is real if it is asked for, with controllers and a scheduler: see package
// node. Otherwise its kubelet endpoint is that of package kubelet, and there are no
// controllers and no scheduler: a pod runs only if RunPod starts it, and a service
// account exists only if a manifest creates it. Deleting a running pod works, as that
// is up to the kubelet.
package cluster
