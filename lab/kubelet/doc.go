// SPDX-License-Identifier: Apache-2.0

// Package kubelet is a kubelet's HTTPS endpoint without a container runtime: its
// pods are processes on this machine. So exec, attach, cp, port-forward and logs -f,
// which an API server streams through a kubelet, are real.
//
// A pod has one container, which is one process with a folder of its own. It is not
// isolated: exec runs commands as the user who runs the lab, with access to that
// user's files. So the endpoint listens only on loopback and requires a client
// certificate, which only the lab's API server has.
//
// Processes end with what started them: those of exec with their connection, those
// of a pod with RemovePod, all of them with Stop.
package kubelet
