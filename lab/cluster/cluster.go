// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/kubelet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

const (
	// startTimeout is how long etcd and kube-apiserver may each take to answer.
	// They take about three seconds on an idle machine.
	startTimeout = time.Minute

	// stopTimeout is how long each may take to stop before it is killed.
	stopTimeout = 20 * time.Second
)

// Files and folders in a cluster's folder, besides the components' logs and the
// kubelet's folder.
const (
	dataDir  = "etcd"
	certsDir = "certs"
	auditLog = "audit.log"
)

// auditPolicy logs every request once, when it is answered, and requests that stay
// open, such as watches and exec, also when they begin. For SubjectAccessReviews, it
// logs the question and the answer.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: RequestResponse
    resources: [{group: authorization.k8s.io, resources: [subjectaccessreviews]}]
  - level: Metadata
`

// Config says how to run a cluster.
type Config struct {
	// AssetsDir is the folder with etcd and kube-apiserver. Default: the lab's own.
	// As in envtest, $KUBEBUILDER_ASSETS overrides both.
	AssetsDir string

	// Dir is the folder for everything that the cluster writes, including its logs.
	// It is created if necessary. When the cluster stops, everything but etcd's data
	// and the certificates stays.
	Dir string

	// RealNode asks for a node with kubelet, containerd and Kubernetes' controllers.
	// Without it, pods are processes of this machine. See [node.Unavailable] for where
	// it cannot run.
	RealNode bool

	// Shared is a folder of this machine that the pods of RunPod see too, under the
	// same path. Pods that are processes see all folders.
	Shared string
}

// Cluster is a running cluster.
type Cluster struct {
	dir       string
	etcd      *component
	apiServer *component
	plane     envtest.ControlPlane
	ca        *pki.CA // issues the kubelet's certificate and the API server's client certificate
	admin     *rest.Config
	client    kubernetes.Interface

	node   *node.Node // the real node, or nil
	shared string

	// Without a real node:
	kubelet    *kubelet.Server
	watch      *podWatch
	controller *process.Process
}

// Start starts a cluster and waits until it is usable. If that fails, the error
// names the component that failed, the reason, and its log.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	c := &Cluster{dir: dir, shared: cfg.Shared}
	if err := c.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("start cluster: %w", err), c.Stop())
	}
	return c, nil
}

// start does the work of Start. If it fails, Start stops what it has started.
func (c *Cluster) start(ctx context.Context, cfg Config) (err error) {
	// Remove what a killed cluster has left here: envtest would reuse its
	// certificates.
	for _, name := range []string{dataDir, certsDir, auditLog} {
		if err := os.RemoveAll(c.path(name)); err != nil {
			return err
		}
	}
	for _, name := range []string{dataDir, certsDir} {
		if err := os.MkdirAll(c.path(name), 0o700); err != nil {
			return err
		}
	}
	if c.ca, err = pki.NewCA("lab kubelet"); err != nil {
		return err
	}
	if cfg.RealNode {
		return c.startWithRealNode(ctx, cfg.AssetsDir)
	}
	if err := c.startKubelet(); err != nil {
		return err
	}
	if err := c.startEtcd(ctx, cfg.AssetsDir); err != nil {
		return err
	}
	if err := c.startAPIServer(ctx, cfg.AssetsDir); err != nil {
		return err
	}
	if err := c.startController(ctx); err != nil {
		return err
	}
	return c.startNode(ctx)
}

// startKubelet starts the node's kubelet endpoint.
func (c *Cluster) startKubelet() (err error) {
	cert, err := c.ca.Server()
	if err != nil {
		return err
	}
	c.kubelet, err = kubelet.Start(kubelet.Config{
		Dir:         c.path("kubelet"),
		Certificate: cert,
		ClientCA:    c.ca.Pool(),
	})
	return err
}

// startEtcd starts etcd.
func (c *Cluster) startEtcd(ctx context.Context, assets string) (err error) {
	if c.etcd, err = newComponent("etcd", assets, c.dir); err != nil {
		return err
	}
	c.plane.Etcd = &envtest.Etcd{
		Path:         c.etcd.wrapper,
		DataDir:      c.path(dataDir),
		Out:          c.etcd.log,
		Err:          c.etcd.log,
		StartTimeout: startTimeout,
		StopTimeout:  stopTimeout,
	}
	return c.etcd.start(ctx, c.plane.Etcd.Start)
}

// startAPIServer starts kube-apiserver and makes the administrator's client.
func (c *Cluster) startAPIServer(ctx context.Context, assets string) (err error) {
	if c.apiServer, err = newComponent("kube-apiserver", assets, c.dir); err != nil {
		return err
	}
	clientCert, clientKey, err := c.ca.Client(kubeletClient)
	if err != nil {
		return err
	}
	certs := c.path(certsDir)
	for name, content := range map[string][]byte{
		"audit-policy.yaml":  []byte(auditPolicy),
		"kubelet-ca.crt":     c.ca.PEM(),
		"kubelet-client.crt": clientCert,
		"kubelet-client.key": clientKey,
	} {
		if err := os.WriteFile(filepath.Join(certs, name), content, 0o600); err != nil {
			return err
		}
	}
	server := &envtest.APIServer{
		Path:         c.apiServer.wrapper,
		CertDir:      certs,
		EtcdURL:      c.plane.Etcd.URL,
		Out:          c.apiServer.log,
		Err:          c.apiServer.log,
		StartTimeout: startTimeout,
		StopTimeout:  stopTimeout,
	}
	c.plane.APIServer = server
	server.Configure().
		Set("audit-policy-file", filepath.Join(certs, "audit-policy.yaml")).
		Set("audit-log-path", c.AuditLog()).
		// The API server and the kubelet authenticate each other by certificate, as
		// in a secure cluster.
		Set("kubelet-certificate-authority", filepath.Join(certs, "kubelet-ca.crt")).
		Set("kubelet-client-certificate", filepath.Join(certs, "kubelet-client.crt")).
		Set("kubelet-client-key", filepath.Join(certs, "kubelet-client.key")).
		Set("kubelet-preferred-address-types", "InternalIP")
	if c.node != nil {
		if err := c.configureForNode(server); err != nil {
			return err
		}
	}
	if err := c.apiServer.start(ctx, server.Start); err != nil {
		return err
	}
	admin, err := c.plane.AddUser(
		envtest.User{Name: "lab-admin", Groups: []string{"system:masters"}},
		&rest.Config{QPS: -1}, // no rate limit in the client
	)
	if err != nil {
		return fmt.Errorf("kube-apiserver: %w", err)
	}
	c.admin = admin.Config()
	c.admin.Host = strings.TrimSuffix(c.admin.Host, "/")
	c.client, err = kubernetes.NewForConfig(c.admin)
	return err
}

// Stop stops the cluster, waits until every process has ended, and removes etcd's
// data and the certificates.
func (c *Cluster) Stop() error {
	var errs []error
	if c.watch != nil {
		c.watch.stop()
	}
	if c.node != nil {
		errs = append(errs, c.node.Stop())
	}
	if c.kubelet != nil { // this also ends the streams through the API server
		errs = append(errs, c.kubelet.Stop())
	}
	if c.controller != nil {
		errs = append(errs, c.controller.Stop(stopTimeout))
	}
	if c.plane.APIServer != nil {
		if c.node != nil {
			// The node's connections were never closed, and the API server would wait a
			// minute for the requests on them.
			kill := time.AfterFunc(restartGrace, c.apiServer.kill)
			defer kill.Stop()
		}
		errs = append(errs, c.plane.APIServer.Stop())
	}
	if c.plane.Etcd != nil {
		errs = append(errs, c.plane.Etcd.Stop())
	}
	for _, component := range []*component{c.apiServer, c.etcd} {
		if component != nil {
			errs = append(errs, component.release())
		}
	}
	for _, name := range []string{dataDir, certsDir} {
		errs = append(errs, os.RemoveAll(c.path(name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop cluster: %w", err)
	}
	return nil
}

// Host returns the URL of the API server, without a path.
func (c *Cluster) Host() string { return c.admin.Host }

// CA returns the certificate authority of the API server's certificate, as PEM.
func (c *Cluster) CA() []byte { return c.admin.CAData }

// Admin returns a new client configuration of the administrator.
func (c *Cluster) Admin() *rest.Config { return rest.CopyConfig(c.admin) }

// AuditLog returns the path of the audit log. It has one JSON event per line, which
// says who asked for what, as which user, and how it was answered.
func (c *Cluster) AuditLog() string { return c.path(auditLog) }

// path returns the path of a file in the cluster's folder.
func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }
