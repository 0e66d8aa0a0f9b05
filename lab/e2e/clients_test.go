// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	clientinformers "k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// informer is a client-go informer for configmaps, with a watch of its own.
type informer struct{ names chan string }

// want waits until the informer has seen an object of that name.
func (i *informer) want(t *testing.T, name string) {
	t.Helper()
	// A reflector whose connection broke waits up to 30 s before it retries.
	timeout := time.NewTimer(time.Minute)
	defer timeout.Stop()
	for {
		select {
		case got := <-i.names:
			if got == name {
				return
			}
		case <-timeout.C:
			t.Fatalf("an informer did not see configmap %s within a minute", name)
		}
	}
}

// informers starts n informers of one client. They run until the test ends.
func informers(t *testing.T, caller string, n int) []*informer {
	t.Helper()
	config, err := theLab.Callers[caller].REST()
	if err != nil {
		t.Fatal(err)
	}
	return startInformers(t, config, n)
}

func startInformers(t *testing.T, config *rest.Config, n int) (started []*informer) {
	t.Helper()
	config.QPS = -1 // no rate limit in the client
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	for range n {
		i := &informer{names: make(chan string, 1000)}
		// Each has its own factory, as informers of one factory share their watches.
		factory := clientinformers.NewSharedInformerFactoryWithOptions(client, 0, clientinformers.WithNamespace("default"))
		shared := factory.Core().V1().ConfigMaps().Informer()
		if _, err := shared.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(object any) { i.names <- object.(*corev1.ConfigMap).Name },
		}); err != nil {
			t.Fatal(err)
		}
		factory.Start(ctx.Done())
		t.Cleanup(factory.Shutdown)
		started = append(started, i)
		if !cache.WaitForCacheSync(t.Context().Done(), shared.HasSynced) {
			t.Fatal("an informer has not synced")
		}
	}
	t.Cleanup(cancel) // runs before the factories wait for their informers
	return started
}

func TestInformers_TwentyShareOneConnection(t *testing.T) {
	const n = 20
	config, err := theLab.Callers["bob"].REST()
	if err != nil {
		t.Fatal(err)
	}
	var dialled atomic.Int32
	dial := config.Dial
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled.Add(1)
		return dial(ctx, network, address)
	}
	before, err := connectionsTo(theLab.Cluster.Host())
	if err != nil {
		t.Logf("connections from Caddy to the API server are not counted: %v", err)
	}
	started := startInformers(t, config, n)

	const object = "seen-by-all"
	kubectl(t, "alice", "create", "configmap", object)
	defer kubectl(t, "alice", "delete", "configmap", object, "--ignore-not-found")
	for _, i := range started {
		i.want(t, object)
	}
	if got := dialled.Load(); got != 1 {
		t.Errorf("the client dialled %d times for %d watches; want once, as HTTP/2 carries them all", got, n)
	}
	if err != nil {
		return
	}
	after, err := connectionsTo(theLab.Cluster.Host())
	if err != nil {
		t.Fatal(err)
	}
	if after == 0 {
		t.Error("no connection from Caddy to the API server was found")
	}
	// Idle connections may come and go, but not one for each watch.
	if more := after - before; more > 3 {
		t.Errorf("%d watches took %d more connections from Caddy to the API server; want at most a few", n, more)
	}
	t.Logf("%d watches over %d connections to Caddy; Caddy has %d connections to the API server, %d more than before", n, dialled.Load(), after, after-before)
}

// connectionsTo returns how many connections this process has to a server. They are Caddy's and the lab's own.
func connectionsTo(server string) (n int, err error) {
	if runtime.GOOS != "linux" {
		return 0, errors.New("only Linux has /proc/net/tcp")
	}
	u, err := url.Parse(server)
	if err != nil {
		return 0, err
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		return 0, err
	}
	own, err := sockets()
	if err != nil {
		return 0, err
	}
	table, err := os.ReadFile("/proc/self/net/tcp")
	if err != nil {
		return 0, err
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if err != nil || !ip.Is4() {
		return 0, fmt.Errorf("%s is not an IPv4 address: %w", u.Hostname(), err)
	}
	// The kernel writes the address as a number in the machine's byte order.
	b := ip.As4()
	remote := fmt.Sprintf("%s:%04X", strings.ToUpper(hex.EncodeToString(binary.NativeEndian.AppendUint32(nil, binary.BigEndian.Uint32(b[:])))), port)
	for line := range strings.Lines(string(table)) {
		const established = "01"
		// sl local remote state queues timer retransmissions uid timeout inode
		fields := strings.Fields(line)
		if len(fields) > 9 && fields[2] == remote && fields[3] == established && own["socket:["+fields[9]+"]"] {
			n++
		}
	}
	return n, nil
}

// sockets returns the sockets that this process has open.
func sockets() (map[string]bool, error) {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	found := make(map[string]bool)
	for _, file := range files {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", file.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed since
		}
		if err != nil {
			return nil, err
		}
		found[target] = true
	}
	return found, nil
}

func TestHelm_InstallsAndUpgradesChart(t *testing.T) {
	chart := t.TempDir()
	for name, content := range map[string]string{
		"Chart.yaml":  "apiVersion: v2\nname: greeting\nversion: 0.1.0\n",
		"values.yaml": "word: none\n",
		"templates/configmap.yaml": `apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ .Release.Name }}-greeting
data:
  word: {{ .Values.word | quote }}
`,
	} {
		path := filepath.Join(chart, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const release = "e2e"
	if _, stderr, err := helm(t, "bob", "install", release, chart); err == nil || !strings.Contains(stderr, `User "bob@example.com" cannot`) {
		t.Errorf("bob, who may only view, installing: %v: %s; want the API server's refusal", err, stderr)
	}
	run := func(args ...string) string {
		t.Helper()
		stdout, stderr, err := helm(t, "alice", args...)
		if err != nil {
			t.Fatalf("helm %s: %v: %s%s", strings.Join(args, " "), err, stdout, stderr)
		}
		return stdout
	}
	word := func() string {
		t.Helper()
		return kubectl(t, "alice", "get", "configmap", release+"-greeting", "-o", "jsonpath={.data.word}")
	}
	run("install", release, chart, "--set", "word=hello")
	defer run("uninstall", release, "--ignore-not-found")
	if got := word(); got != "hello" {
		t.Errorf("after the installation, the configmap has %q; want hello", got)
	}
	run("upgrade", release, chart, "--set", "word=goodbye")
	if got := word(); got != "goodbye" {
		t.Errorf("after the upgrade, the configmap has %q; want goodbye", got)
	}
	if got := strings.Fields(run("list", "--no-headers")); len(got) < 3 || got[0] != release || got[2] != "2" {
		t.Errorf("helm list printed %q; want %s at revision 2", got, release)
	}
	if got := run("get", "values", release, "-o", "json"); strings.TrimSpace(got) != `{"word":"goodbye"}` {
		t.Errorf("helm get values printed %s; want the upgrade's", got)
	}
	run("uninstall", release)
	if got := kubectl(t, "alice", "get", "configmap", release+"-greeting", "--ignore-not-found"); got != "" {
		t.Errorf("after the removal, %s still exists", got)
	}
}

// helm runs Helm as a caller, with its own home folders.
func helm(t *testing.T, caller string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	path, err := components.Path("helm")
	if err != nil {
		t.Fatal(err)
	}
	// Not the test's context, which has ended when a cleanup runs Helm.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	kubeconfig := theLab.Callers[caller].Kubeconfig
	cmd := exec.CommandContext(ctx, path, args...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig,
		"HELM_CACHE_HOME="+filepath.Join(theLab.Dir, "helm", "cache"),
		"HELM_CONFIG_HOME="+filepath.Join(theLab.Dir, "helm", "config"),
		"HELM_DATA_HOME="+filepath.Join(theLab.Dir, "helm", "data"))
	err = cmd.Run()
	return out.String(), errOut.String(), err
}
