// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

// kubeletClient is whom the API server authenticates to the kubelet as.
const kubeletClient = "kube-apiserver"

// Files in the folder of certificates, by the names that envtest uses.
const (
	servingCert, servingKey                 = "apiserver.crt", "apiserver.key"
	serviceAccountCert, serviceAccountKey   = "sa-signer.crt", "sa-signer.key"
	frontProxyCA, frontProxyCert, frontPKey = "front-proxy-ca.crt", "front-proxy-client.crt", "front-proxy-client.key"
)

// Node returns the real node, or nil if the cluster has none.
func (c *Cluster) Node() *node.Node { return c.node }

// startWithRealNode starts the cluster with a real node.
func (c *Cluster) startWithRealNode(ctx context.Context, assets string) error {
	started := make(chan error, 1)
	go func() { started <- c.startEtcd(ctx, assets) }()
	var err error
	// The API server listens on an address that the node has to have first.
	c.node, err = node.Start(ctx, node.Config{Dir: c.path("node")})
	if err := errors.Join(err, <-started); err != nil {
		return err
	}
	if err := c.startAPIServer(ctx, assets); err != nil {
		return err
	}
	if err := c.allowKubeletClient(ctx); err != nil {
		return err
	}
	return c.node.Join(ctx, node.Cluster{
		Admin:             c.Admin(),
		As:                c.As,
		KubeletCA:         c.ca,
		ServiceAccountKey: filepath.Join(c.path(certsDir), serviceAccountKey),
	})
}

// configureForNode makes the API server listen where the node and its pods reach it,
// and lets it do what it does in any cluster with nodes.
func (c *Cluster) configureForNode(server *envtest.APIServer) error {
	host := c.node.Host().String()
	server.Address, server.Port = host, "6443"
	serving, err := pki.NewCA("lab kube-apiserver")
	if err != nil {
		return err
	}
	frontProxy, err := pki.NewCA("lab front proxy")
	if err != nil {
		return err
	}
	// envtest issues none if there are some.
	server.CA = serving.PEM()
	files := map[string][]byte{frontProxyCA: frontProxy.PEM()}
	if files[servingCert], files[servingKey], err = serving.ServerPEM(host, "10.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"); err != nil {
		return err
	}
	if files[serviceAccountCert], files[serviceAccountKey], err = serving.ServerPEM("service-accounts"); err != nil {
		return err
	}
	if files[frontProxyCert], files[frontPKey], err = frontProxy.Client("front-proxy-client"); err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(c.path(certsDir), name), content, 0o600); err != nil {
			return err
		}
	}
	file := func(name string) string { return filepath.Join(c.path(certsDir), name) }
	server.Configure().
		Set("advertise-address", host).
		Set("authorization-mode", "Node", "RBAC").
		Set("enable-admission-plugins", "NodeRestriction").
		Disable("disable-admission-plugins"). // envtest disables service accounts
		// It reaches pods, but not the addresses of services.
		Set("enable-aggregator-routing", "true").
		Set("requestheader-client-ca-file", file(frontProxyCA)).
		Set("requestheader-allowed-names", "front-proxy-client").
		Set("requestheader-extra-headers-prefix", "X-Remote-Extra-").
		Set("requestheader-group-headers", "X-Remote-Group").
		Set("requestheader-username-headers", "X-Remote-User").
		Set("proxy-client-cert-file", file(frontProxyCert)).
		Set("proxy-client-key-file", file(frontPKey))
	return nil
}

// allowKubeletClient lets the API server use the kubelet.
func (c *Cluster) allowKubeletClient(ctx context.Context) error {
	_, err := c.client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "lab:kubelet-api-admin"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:kubelet-api-admin"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: kubeletClient}},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("allow kube-apiserver to use the kubelet: %w", err)
	}
	return nil
}

// runRealPod is RunPod on a real node.
func (c *Cluster) runRealPod(ctx context.Context, namespace, name string, command []string) error {
	pods := c.client.CoreV1().Pods(namespace)
	grace := int64(1) // shells do not end when they are asked to
	wanted := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			RestartPolicy:                 corev1.RestartPolicyNever,
			Containers: []corev1.Container{{
				Name:    ContainerName,
				Image:   node.Busybox,
				Command: command,
				Stdin:   true,
			}},
		},
	}
	if c.shared != "" {
		wanted.Spec.Volumes = []corev1.Volume{{
			Name:         "shared",
			VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: c.shared}},
		}}
		wanted.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "shared", MountPath: c.shared}}
	}
	pod, err := pods.Create(ctx, wanted, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("run pod %s/%s: %w", namespace, name, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("timed out"))
	defer cancel()
	var last string
	err = poll(ctx, func() (bool, error) {
		now, err := pods.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		last = string(now.Status.Phase)
		for _, s := range now.Status.ContainerStatuses {
			switch {
			case s.State.Terminated != nil:
				return false, fmt.Errorf("%s: %s", s.State.Terminated.Reason, s.State.Terminated.Message)
			case s.State.Waiting != nil && s.State.Waiting.Message != "":
				return false, fmt.Errorf("%s: %s", s.State.Waiting.Reason, s.State.Waiting.Message)
			case s.Ready:
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		err = fmt.Errorf("run pod %s/%s: %w (phase %s)", namespace, name, err, last)
		if deleteErr := deletePod(context.WithoutCancel(ctx), c.client, pod); !apierrors.IsNotFound(deleteErr) {
			err = errors.Join(err, deleteErr)
		}
		return err
	}
	return nil
}
