// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"fmt"
)

// kernelSettings are what kubelet sets in the kernel, which this machine shares with
// the node. On the node, the files already say so.
var kernelSettings = map[string]string{
	"/proc/sys/vm/overcommit_memory":      "1\n",
	"/proc/sys/vm/panic_on_oom":           "0\n",
	"/proc/sys/kernel/panic":              "10\n",
	"/proc/sys/kernel/panic_on_oops":      "1\n",
	"/proc/sys/kernel/keys/root_maxkeys":  "1000000\n",
	"/proc/sys/kernel/keys/root_maxbytes": "25000000\n",
}

// containerdConfig returns containerd's configuration. Without restrict_oom_score_adj,
// runc needs CAP_SYS_RESOURCE.
func (n *Node) containerdConfig() string {
	return fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = %q

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
disable_apparmor = true
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = %q
conf_dir = %q

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = %q
SystemdCgroup = false
`, socket, pauseImage, n.parts.path("usr/lib/cni"), n.path("cni"), n.parts.path("usr/sbin/runc"))
}

// cniConfig returns the configuration of the pods' network. Each pod has a connection
// of its own to the node, which routes: on a bridge, what a service's pod answers to
// another pod would bypass kube-proxy.
func (n *Node) cniConfig() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "lab",
  "plugins": [{
    "type": "ptp",
    "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
  }]
}
`, n.machine.Network.Containers)
}

// kubeletConfig returns kubelet's configuration. The limits on disk space are off:
// the node shares the disk of this machine.
func (n *Node) kubeletConfig() string {
	return toJSON(map[string]any{
		"apiVersion":                    "kubelet.config.k8s.io/v1beta1",
		"kind":                          "KubeletConfiguration",
		"address":                       n.Address().String(),
		"authentication":                map[string]any{"x509": map[string]any{"clientCAFile": n.path("kubelet/client-ca.crt")}, "webhook": map[string]any{"enabled": true}, "anonymous": map[string]any{"enabled": false}},
		"authorization":                 map[string]any{"mode": "Webhook"},
		"tlsCertFile":                   n.path("kubelet/server.crt"),
		"tlsPrivateKeyFile":             n.path("kubelet/server.key"),
		"containerRuntimeEndpoint":      "unix://" + socket,
		"cgroupDriver":                  "cgroupfs",
		"failCgroupV1":                  false,
		"failSwapOn":                    false,
		"makeIPTablesUtilChains":        false,
		"localStorageCapacityIsolation": false,
		"volumePluginDir":               "/var/lib/kubelet/volume-plugins",
		"resolvConf":                    n.path("kubelet/resolv.conf"),
		"clusterDomain":                 "cluster.local",
		"imageGCHighThresholdPercent":   100,
		"containerLogMaxSize":           "1Gi", // kubectl logs -f would lose what is rotated
		"evictionHard":                  map[string]string{"memory.available": "50Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"healthzBindAddress":            "127.0.0.1",
	})
}

// proxyConfig returns kube-proxy's configuration. There are no limits and timeouts of
// connections: these settings do not exist in a network namespace.
func (n *Node) proxyConfig() string {
	return toJSON(map[string]any{
		"apiVersion":         "kubeproxy.config.k8s.io/v1alpha1",
		"kind":               "KubeProxyConfiguration",
		"mode":               "nftables",
		"clientConnection":   map[string]any{"kubeconfig": n.path("kube-proxy.kubeconfig")},
		"hostnameOverride":   Name,
		"clusterCIDR":        n.machine.Network.Containers.String(),
		"conntrack":          map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
		"healthzBindAddress": "127.0.0.1:10256",
		"metricsBindAddress": "127.0.0.1:10249",
	})
}

// toJSON returns v, which has only strings, numbers and maps, as JSON.
func toJSON(v any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(err)
	}
	return string(b)
}
