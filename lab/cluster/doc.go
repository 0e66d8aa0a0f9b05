// SPDX-License-Identifier: Apache-2.0

// Package cluster runs a Kubernetes cluster on the loopback interface: the real
// etcd and kube-apiserver, started through envtest, and one node whose kubelet
// endpoint is that of package kubelet. Authentication, RBAC, the audit log and
// everything an API server streams through a kubelet are therefore real.
//
// There are no controllers and no scheduler: a pod runs if RunPod has started
// it, and service accounts exist if a manifest creates them. Deleting a running
// pod works, as that is up to the kubelet.
package cluster
