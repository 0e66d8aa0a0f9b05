// SPDX-License-Identifier: Apache-2.0

// Package kubelet is a kubelet's HTTPS endpoint without a container runtime: its
// pods are processes on this machine. That makes what an API server streams
// through a kubelet real: exec, attach, cp, port-forward and logs -f.
//
// A pod has one container, which is one process with a folder of its own. It is
// not isolated in any way: exec runs commands as the user the lab runs as, with
// that user's files. The endpoint therefore listens on loopback only and talks to
// nobody but the holder of a client certificate, the lab's API server.
//
// Processes end with what they were started for: those of exec with the
// connection that asked for them, those of a pod with RemovePod, all of them with
// Stop.
package kubelet
