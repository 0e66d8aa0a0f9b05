// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

const (
	// release is the name of the Helm release, and so of the replicas' tailnet nodes.
	release = "k8s"
	// namespace is the release's. The lab's own proxy needs none of what is in it.
	namespace = "access"
	// image is what the pods run, under the name that its archive has.
	image = "localhost/caddy-tailscale-impersonate:stand-in"
	// keySecret is the Secret with the auth key.
	keySecret = "tailscale"
	// gracePeriod is how long a replica may take to exit, as the chart's values say.
	gracePeriod = 10 * time.Second
)

// replicas are the pods of the release, and the names of their tailnet nodes.
var replicas = []string{release + "-0", release + "-1"}

// callers are those of the README's policy file, and what the API server lets them do.
var callers = []struct {
	lab.CallerSpec
	user, groups               string
	reads, deletes, readsAtAll string // "yes" or "no", as kubectl auth can-i prints
}{
	{lab.CallerSpec{Name: "alice", Login: "alice@example.com"}, "alice@example.com", "system:masters", "yes", "yes", "yes"},
	{lab.CallerSpec{Name: "bob", Login: "bob@example.com"}, "bob@example.com", "tailnet-readers", "yes", "no", "no"},
	{lab.CallerSpec{Name: "carol", Login: "carol@example.com"}, "carol@example.com", "", "yes", "no", "no"},
	{lab.CallerSpec{Name: "ci", Tags: []string{"tag:k8s-readers"}}, "ci." + lab.Domain, "tag:k8s-readers", "yes", "no", "no"},
	{lab.CallerSpec{Name: "dave", Login: "dave@example.com"}, "dave@example.com", "", "no", "no", "no"},
}

// installation is a cluster and a tailnet that the chart can be installed in.
type installation struct {
	*testing.T
	lab   *lab.Lab
	root  string // of the project
	admin kubernetes.Interface
	// before are the objects of the cluster before the chart was installed.
	before map[string]bool
}

// start starts a tailnet and a cluster with a real node that has the image, a namespace
// for restricted pods, the key and the volumes.
func start(t *testing.T) *installation {
	t.Helper()
	if err := node.Unavailable(); err != nil {
		t.Skip(err)
	}
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	i := &installation{T: t, root: root}
	dir := tempdir.New(t)
	// With an empty build cache, this takes minutes.
	if err := buildImage(t.Context(), root, filepath.Join(dir, "image")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cfg := lab.Config{Dir: dir, Examples: filepath.Join(root, "examples"), RealNode: true, PodsJoin: true, Progress: os.Stderr}
	for _, c := range callers {
		cfg.Callers = append(cfg.Callers, c.CallerSpec)
	}
	if i.lab, err = lab.Start(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.lab.Stop(); err != nil {
			t.Error(err)
		}
	})
	i.load(ctx, filepath.Join(dir, "image"))
	if i.admin, err = kubernetes.NewForConfig(i.lab.Cluster.Admin()); err != nil {
		t.Fatal(err)
	}
	i.prepare(ctx)
	i.before = i.objects()
	return i
}

// buildImage builds the image for this machine, as "make image" does for all.
func buildImage(ctx context.Context, root, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "run", "./cmd/image", "-arch", runtime.GOARCH, "-out", dir)
	cmd.Dir = filepath.Join(root, "lab")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the image: %w: %s", err, out)
	}
	return nil
}

// load brings the image onto the node.
func (i *installation) load(ctx context.Context, dir string) {
	i.Helper()
	archive := filepath.Join(dir, "caddy-tailscale-impersonate-stand-in-oci.tar")
	if err := i.lab.Cluster.Node().Import(ctx, archive); err != nil {
		i.Fatal(err)
	}
}

// prepare creates what the chart's README says that one needs, and the volumes: the node
// has nothing that provides them.
func (i *installation) prepare(ctx context.Context) {
	i.Helper()
	i.kubectl("create", "namespace", namespace)
	i.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
	key, err := i.lab.Headscale.TagKey(ctx, lab.ProxyTag)
	if err != nil {
		i.Fatal(err)
	}
	i.kubectl("--namespace", namespace, "create", "secret", "generic", keySecret, "--from-literal=auth-key="+key)
	for _, replica := range replicas {
		for _, volume := range []string{"data", "recordings"} {
			if err := os.MkdirAll(i.volume(volume, replica), 0o755); err != nil {
				i.Fatal(err)
			}
			if err := i.lab.Cluster.Apply(ctx, fmt.Appendf(nil, `
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s-%[2]s}
spec:
  capacity: {storage: 2Gi}
  accessModes: [ReadWriteOnce]
  claimRef: {namespace: %[3]s, name: %[1]s-%[2]s}
  local: {path: %[4]s}
  nodeAffinity:
    required:
      nodeSelectorTerms:
      - matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%[5]s]}]
`, volume, replica, namespace, i.volume(volume, replica), node.Name)); err != nil {
				i.Fatal(err)
			}
		}
	}
	i.until("the namespace has its first objects", func() error {
		_, ca := i.admin.CoreV1().ConfigMaps(namespace).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		_, account := i.admin.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
		return errors.Join(ca, account)
	})
}

// volume returns the folder of a replica's volume.
func (i *installation) volume(name, replica string) string {
	return filepath.Join(i.lab.Dir, "volumes", name+"-"+replica)
}

// values returns the arguments with which Helm installs the chart as its README says.
func (i *installation) values(further ...string) []string {
	repository, tag, _ := strings.Cut(image, ":")
	args := []string{
		filepath.Join(i.root, "charts", "caddy-tailscale-impersonate"), "--namespace", namespace,
		"--set", "image.repository=" + repository + ",image.tag=" + tag,
		"--set", "tailscale.tailnet=" + lab.Domain + ",tailscale.controlURL=" + i.lab.Headscale.URL() + ",tls.issuer=internal,auth.existingSecret=" + keySecret,
		"--set-json", `rbac.groups=["system:masters", "tailnet-readers", "tag:k8s", "tag:k8s-readers"]`,
		// Tailscale's nodes would look for its log server.
		"--set-json", `env=[{"name": "TS_NO_LOGS_NO_SUPPORT", "value": "true"}]`,
	}
	return append(args, further...)
}

// run runs a command and returns what it prints. It fails the test if the command fails.
func (i *installation) run(cmd *exec.Cmd, err error) string {
	i.Helper()
	if err != nil {
		i.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		i.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, stderr.String())
	}
	return string(out)
}

// kubectl runs kubectl as the administrator, directly.
func (i *installation) kubectl(args ...string) string {
	i.Helper()
	ctx, cancel := context.WithTimeout(i.Context(), 7*time.Minute)
	defer cancel()
	return i.run(lab.Kubectl(ctx, i.lab.AdminKubeconfig(), args...))
}

// helm runs Helm as the administrator.
func (i *installation) helm(args ...string) string {
	i.Helper()
	ctx, cancel := context.WithTimeout(i.Context(), 7*time.Minute)
	defer cancel()
	return i.run(lab.Helm(ctx, i.lab.AdminKubeconfig(), args...))
}

// rollout waits until every replica runs what the StatefulSet says, and is ready.
func (i *installation) rollout() {
	i.Helper()
	i.kubectl("--namespace", namespace, "rollout", "status", "statefulset/"+release, "--timeout=6m")
}

// ca returns the root certificate of a replica, from its volume.
func (i *installation) ca(replica string) []byte {
	i.Helper()
	ca, err := os.ReadFile(filepath.Join(i.volume("data", replica), "caddy", "pki", "authorities", "local", "root.crt"))
	if err != nil {
		i.Fatal(err)
	}
	return ca
}

// server returns the address of a replica's site.
func server(replica string) string { return "https://" + replica + "." + lab.Domain }

// kubeconfig returns the path of a caller's kubeconfig for a replica.
func (i *installation) kubeconfig(caller, replica string) string {
	i.Helper()
	path := filepath.Join(i.lab.Dir, caller+"-"+replica+".kubeconfig")
	if err := i.lab.Callers[caller].TrustKubeconfig(path, server(replica), i.ca(replica)); err != nil {
		i.Fatal(err)
	}
	return path
}

// through runs kubectl as a caller, through a replica.
func (i *installation) through(replica, caller string, args ...string) (string, error) {
	i.Helper()
	ctx, cancel := context.WithTimeout(i.Context(), time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, i.kubeconfig(caller, replica), args...)
	if err != nil {
		i.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s as %s through %s: %w: %s", strings.Join(args, " "), caller, replica, err, stderr.String())
	}
	return string(out), err
}

// client returns a client of a replica's site, as a caller.
func (i *installation) client(caller, replica string) *kubernetes.Clientset {
	i.Helper()
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host:            server(replica),
		TLSClientConfig: rest.TLSClientConfig{CAData: i.ca(replica)},
		Dial:            i.lab.Callers[caller].Dial,
		QPS:             -1,
		WarningHandler:  rest.NoWarnings{},
	})
	if err != nil {
		i.Fatal(err)
	}
	return client
}

// objects returns all objects of the cluster but events and leases, which come and go.
func (i *installation) objects() map[string]bool {
	i.Helper()
	var kinds []string
	for _, kind := range strings.Fields(i.kubectl("api-resources", "--verbs=list", "--output=name")) {
		if name, _, _ := strings.Cut(kind, "."); name != "events" && name != "leases" && !strings.HasPrefix(kind, "componentstatuses") {
			kinds = append(kinds, kind)
		}
	}
	found := make(map[string]bool)
	for line := range strings.Lines(i.kubectl("get", strings.Join(kinds, ","), "--all-namespaces", "--ignore-not-found",
		`--output=jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}`)) {
		// Controllers make accounts of their own there, as they start.
		if object := strings.TrimSpace(line); !strings.HasPrefix(object, "ServiceAccount kube-system/") {
			found[object] = true
		}
	}
	return found
}

// until waits until f returns nil, for three minutes at most.
func (i *installation) until(what string, f func() error) {
	i.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(250 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			i.Fatalf("it is not so that %s: %v", what, err)
		}
	}
}
