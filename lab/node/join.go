// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
)

// Cluster is a cluster that a node joins. Its API server listens on [Node.Host],
// authorizes nodes, and reaches the kubelet with a client certificate.
type Cluster struct {
	// Admin is the administrator's client configuration.
	Admin *rest.Config
	// As returns the client configuration of another user.
	As func(user string, groups ...string) (*rest.Config, error)
	// KubeletCA issues the kubelet's certificate and the API server's client
	// certificate.
	KubeletCA *pki.CA
	// ServiceAccountKey is the file with the key that signs tokens of service
	// accounts.
	ServiceAccountKey string
}

// Join makes the node join a cluster, and returns when it is ready for pods: the node
// is Ready, and the namespace default has its service account.
func (n *Node) Join(ctx context.Context, c Cluster) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, errors.New("timed out"))
	defer cancel()
	if err := n.join(ctx, c); err != nil {
		return fmt.Errorf("join node: %w", err)
	}
	return nil
}

func (n *Node) join(ctx context.Context, c Cluster) error {
	client, err := kubernetes.NewForConfig(c.Admin)
	if err != nil {
		return err
	}
	// kube-controller-manager ends if it starts earlier.
	if err := n.poll(ctx, "kube-apiserver is ready", func() error {
		_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	}); err != nil {
		return err
	}
	if err := n.writeCredentials(c); err != nil {
		return err
	}
	for _, d := range [][]string{
		{"kubelet", "--config=" + n.path("kubelet/config.json"), "--kubeconfig=" + n.path("kubelet.kubeconfig"), "--hostname-override=" + Name, "--node-ip=" + n.Address().String()},
		{
			"kube-controller-manager", "--kubeconfig=" + n.path("kube-controller-manager.kubeconfig"),
			"--authentication-kubeconfig=" + n.path("kube-controller-manager.kubeconfig"),
			"--authorization-kubeconfig=" + n.path("kube-controller-manager.kubeconfig"),
			"--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials",
			"--root-ca-file=" + n.path("cluster-ca.crt"), "--service-account-private-key-file=" + c.ServiceAccountKey,
		},
		{
			"kube-scheduler", "--kubeconfig=" + n.path("kube-scheduler.kubeconfig"),
			"--authentication-kubeconfig=" + n.path("kube-scheduler.kubeconfig"),
			"--authorization-kubeconfig=" + n.path("kube-scheduler.kubeconfig"),
			"--bind-address=127.0.0.1", "--leader-elect=false",
		},
		{"kube-proxy", "--config=" + n.path("kube-proxy.json")},
	} {
		if err := n.startDaemon(d[0], append([]string{n.parts.kubernetes}, d...)...); err != nil {
			return err
		}
	}
	if err := n.poll(ctx, "the node is ready", func() error {
		node, err := client.CoreV1().Nodes().Get(ctx, Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		return ready(node)
	}); err != nil {
		return err
	}
	return n.poll(ctx, "the namespace default has its service account", func() error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// ready returns why pods cannot run on a node, or nil.
func ready(node *corev1.Node) error {
	for _, condition := range node.Status.Conditions {
		if condition.Type != corev1.NodeReady {
			continue
		}
		if condition.Status != corev1.ConditionTrue {
			return fmt.Errorf("%s: %s", condition.Reason, condition.Message)
		}
		if len(node.Spec.Taints) > 0 {
			return fmt.Errorf("it has the taint %s", node.Spec.Taints[0].Key)
		}
		return nil
	}
	return errors.New("kubelet has not reported its status")
}

// writeCredentials writes what the parts use to authenticate, and their configuration.
func (n *Node) writeCredentials(c Cluster) error {
	for name, user := range map[string][]string{
		"kubelet":                 {"system:node:" + Name, "system:nodes"},
		"kube-controller-manager": {"system:kube-controller-manager"},
		"kube-scheduler":          {"system:kube-scheduler"},
		"kube-proxy":              {"system:kube-proxy"},
	} {
		config, err := c.As(user[0], user[1:]...)
		if err != nil {
			return err
		}
		if err := writeKubeconfig(n.path(name+".kubeconfig"), config); err != nil {
			return err
		}
	}
	cert, key, err := c.KubeletCA.ServerPEM(n.Address().String())
	if err != nil {
		return err
	}
	return n.writeFiles(map[string]string{
		"cluster-ca.crt":        string(c.Admin.CAData),
		"kubelet/client-ca.crt": string(c.KubeletCA.PEM()),
		"kubelet/server.crt":    string(cert),
		"kubelet/server.key":    string(key),
		"kubelet/resolv.conf":   "",
		"kubelet/config.json":   n.kubeletConfig(),
		"kube-proxy.json":       n.proxyConfig(),
	})
}

// writeKubeconfig writes a client configuration with a certificate as a kubeconfig.
func writeKubeconfig(path string, c *rest.Config) error {
	config := api.NewConfig()
	config.Clusters["lab"] = &api.Cluster{Server: c.Host, CertificateAuthorityData: c.CAData}
	config.AuthInfos["lab"] = &api.AuthInfo{ClientCertificateData: c.CertData, ClientKeyData: c.KeyData}
	config.Contexts["lab"] = &api.Context{Cluster: "lab", AuthInfo: "lab"}
	config.CurrentContext = "lab"
	return clientcmd.WriteToFile(*config, path)
}
