// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

const (
	secretsPath = "/api/v1/namespaces/default/secrets"
	configMaps  = "/api/v1/namespaces/default/configmaps"
)

// attack is the part of a page's script that acts on the API at the address in "api" as
// whoever opens the page. Each of its objects is named after the attack.
const attack = `
const pod = '/api/v1/namespaces/default/pods/' + podName;
const socketOf = (path) => api.replace(/^http/, 'ws') + path;
const object = (name) => new Blob([JSON.stringify({ apiVersion: 'v1', kind: 'ConfigMap', metadata: { name: prefix + name } })]);
const create = (name) => fetch(api + configMaps, { method: 'POST', mode: 'no-cors', body: object(name) });
const exec = pod + '/exec?command=true&stdout=true';
const framed = (attributes) => new Promise((resolve) => {
  const frame = Object.assign(document.createElement('iframe'), attributes);
  frame.onload = () => resolve(frame);
  document.documentElement.append(frame);
});

async function attack() {
  await step('read', () => text(api + secrets));
  await step('create', async () => (await create('create')).type);
  await step('exec', () => open(socketOf(exec), 'v5.channel.k8s.io'));
  await step('watch', () => open(socketOf(secrets + '?watch=true')));
  await step('node', () => text(api + '/api/v1/nodes/lab/proxy/run/default/' + podName + '/main?cmd=true', { method: 'POST' }));
  await step('frame', async () => (await framed({ src: api + secrets })).contentDocument.body.innerText.slice(0, 200));
  await step('form', async () => {
    await framed({ name: 'target' });
    const form = Object.assign(document.createElement('form'), { method: 'POST', enctype: 'text/plain', action: api + configMaps, target: 'target' });
    form.append(Object.assign(document.createElement('input'), {
      name: '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"' + prefix + 'form"},"data":{"a":"', value: '"}}',
    }));
    document.documentElement.append(form);
    form.submit();
    await new Promise((resolve) => setTimeout(resolve, 500));
  });
  await step('sandbox', () => new Promise((resolve) => {
    addEventListener('message', (e) => resolve(e.data));
    framed({ sandbox: 'allow-scripts', srcdoc: '<script>(' + sandboxed + ')(' + JSON.stringify([api + configMaps, prefix + 'sandbox', socketOf(exec)]) + ')<' + '/script>' });
  }));
}

function sandboxed([url, name, socket]) {
  const body = new Blob([JSON.stringify({ apiVersion: 'v1', kind: 'ConfigMap', metadata: { name } })]);
  fetch(url, { method: 'POST', mode: 'no-cors', body }).finally(() => {
    const s = new WebSocket(socket, 'v5.channel.k8s.io');
    s.onopen = () => parent.postMessage('open', '*');
    s.onerror = () => parent.postMessage('refused', '*');
  });
}
`

// attackOn returns the script of an attack on a site's API.
func attackOn(api, prefix, then string) string {
	return fmt.Sprintf("const api = %q, prefix = %q, podName = %q, secrets = %q, configMaps = %q;\n", api, prefix, lab.Pod, secretsPath, configMaps) + attack + then
}

// created returns the attacks of a prefix that have created an object, and removes those.
func created(t *testing.T, prefix string) (names []string) {
	t.Helper()
	for _, name := range strings.Fields(kubectl(t, "alice", "get", "configmaps", "-o", "jsonpath={.items[*].metadata.name}")) {
		if attack, found := strings.CutPrefix(name, prefix); found {
			names = append(names, attack)
			kubectl(t, "alice", "delete", "configmap", name)
		}
	}
	return names
}

// servePodApp serves a website as an application of a pod, and returns the path of it below
// the pod's proxy subresource.
func servePodApp(t *testing.T, script string) (*website, string) {
	t.Helper()
	site := serveWebsite(t, net.JoinHostPort(podAddress(t), "0"), script)
	site.Start()
	host, port, err := net.SplitHostPort(site.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", theLab.AdminKubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	admin, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	pods := admin.CoreV1().Pods("default")
	pod, err := pods.Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "app-"},
		// Nothing runs it: its address is that of the website.
		Spec: corev1.PodSpec{SchedulerName: "none", Containers: []corev1.Container{{Name: "main", Image: "lab.example/none"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kubectl(t, "alice", "delete", "pod", pod.Name, "--force") })
	pod.Status.PodIP, pod.Status.PodIPs = host, []corev1.PodIP{{IP: host}}
	if _, err := pods.UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return site, "/api/v1/namespaces/default/pods/" + pod.Name + ":" + port + "/proxy/"
}

// podAddress returns an address of this machine that the API server accepts as a pod's.
func podAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range addrs {
		if network, ok := addr.(*net.IPNet); ok && network.IP.To4() != nil && network.IP.IsGlobalUnicast() {
			return network.IP.String()
		}
	}
	t.Skip("the machine has no address but loopback's, and the API server takes none of these for a pod's")
	return ""
}

// An application that a pod serves works in a browser.
const useApp = `
await step('module', async () => 'ran');
await step('classic', async () => window.classic);
await step('post', () => text('echo', { method: 'POST', body: 'x' }));
await step('delete', () => text('echo', { method: 'DELETE' }));
await step('websocket', () => new Promise((resolve, reject) => {
  const socket = new WebSocket(new URL('websocket', location.href.replace(/^http/, 'ws')));
  socket.onopen = () => socket.send('hello');
  socket.onmessage = (e) => { resolve(e.data); socket.close(); };
  socket.onerror = () => reject(new Error('refused'));
}));
await step('events', () => new Promise((resolve, reject) => {
  const events = new EventSource('events');
  events.onmessage = (e) => { resolve(e.data); events.close(); };
  events.onerror = () => reject(new Error('refused'));
}));
await step('serviceworker', async () => (await navigator.serviceWorker.register('sw.js', { scope: '/' })).scope);
await step('window', async () => {
  const opened = window.open(api + secrets);
  await new Promise((resolve) => setTimeout(resolve, 1000));
  return opened ? opened.document.body.innerText.slice(0, 200) : 'blocked';
});
`

func wantResults(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, start := range want {
		if !strings.HasPrefix(got[name], start) {
			t.Errorf("%s: got %q; want %q", name, got[name], start)
		}
	}
}

// The same page works as an application, whose attack succeeds only on a site with its own
// origin in allow_origins.
func TestOrigin_PodsPageWorksAndCannotAct(t *testing.T) {
	works := map[string]string{"module": "ran", "classic": "ran", "post": "200 POST x", "delete": "200 DELETE", "websocket": "hello", "events": "event"}
	t.Run("default", func(t *testing.T) {
		site, path := servePodApp(t, attackOn("https://"+proxyDomain, "pod-", useApp+"await attack();\nreport();"))
		got := onDevice(t, "alice", "443").visit(t, "https://"+proxyDomain+path, site)
		wantResults(t, got, works)
		const refused = "403 " + `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"tailscale_impersonate: a web page `
		wantResults(t, got, map[string]string{
			"read": refused, "create": "basic", "exec": "refused", "watch": "refused", "node": refused,
			"frame": refused[4:], "window": refused[4:], "sandbox": "refused", "serviceworker": "error: ",
		})
		if names := created(t, "pod-"); names != nil {
			t.Errorf("the page created %q", names)
		}
	})
	t.Run("own origin is allowed", func(t *testing.T) {
		const own = "https://" + proxyDomain + ":" + portUI
		site, path := servePodApp(t, attackOn(own, "own-", useApp+"await attack();\nreport();"))
		got := onDevice(t, "alice", portUI).visit(t, own+path, site)
		wantResults(t, got, works)
		const list = "{\n  \"kind\": \"SecretList\""
		node := "400" // by the API server, which forwards nothing to loopback
		if theLab.Cluster.Node() != nil {
			node = "200 " // the command has run
		}
		wantResults(t, got, map[string]string{
			"read": "200 " + list, "exec": "open", "watch": "open", "node": node,
			"frame": list, "window": list, "sandbox": "refused", "serviceworker": own + "/",
		})
		if names := created(t, "own-"); len(names) == 0 {
			t.Error("the page created nothing")
		}
	})
	t.Run("plain http", func(t *testing.T) {
		site, path := servePodApp(t, "report();")
		page := onDevice(t, "alice", "80").command(t.Context(), t, nil, "--dump-dom", "http://"+proxyDomain+path)
		out, err := page.Output()
		if err != nil || !strings.Contains(string(out), "use https") {
			t.Errorf("%v: got %s; want the advice to use https", err, out)
		}
		if site.opened.Load() != 0 {
			t.Error("the application was asked for its page")
		}
	})
}

// A page elsewhere cannot act either: on another site, on a sibling name, or on another port
// of the same name. It can only open the page of an application, as a link does.
func TestOrigin_OtherPagesCannotAct(t *testing.T) {
	const api = "https://" + proxyDomain
	for _, tt := range []struct{ name, scheme, host string }{
		{"another site", "https", "evil.example.com"},
		{"another site over http", "http", "evil.example.com"},
		{"sibling", "https", "sub." + proxyDomain},
		{"parent", "https", lab.Domain},
		{"same name, another port", "https", proxyDomain + ":9443"},
		{"same name over http", "http", proxyDomain + ":9443"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			app, path := servePodApp(t, "results.app = document.referrer;\nreport();")
			prefix := "other-"
			script := attackOn(api, prefix, `
await attack();
await step('app frame', async () => (await framed({ src: api + app })) && 'loaded');
await report();
location = api + app;`)
			site := serveWebsite(t, "127.0.0.1:0", "const app = '"+path+"';\n"+script)
			if tt.scheme == "https" {
				site.StartTLS()
			} else {
				site.Start()
			}
			b := onDevice(t, "alice", "443")
			got := b.visitBoth(t, tt.scheme+"://"+tt.host, site, app, "MAP "+tt.host+" "+site.Listener.Addr().String())
			wantResults(t, got, map[string]string{
				"read": "error: ", "exec": "refused", "watch": "refused", "node": "error: ", "frame": "error: ", "sandbox": "refused",
			})
			if names := created(t, prefix); names != nil {
				t.Errorf("the page created %q", names)
			}
			if n := app.opened.Load(); n != 1 {
				t.Errorf("the application's page was opened %d times; want once, not in a frame", n)
			}
		})
	}
	// The control: the attacks work for an allowed origin.
	t.Run("allowed origin", func(t *testing.T) {
		const prefix = "allowed-"
		site := serveWebsite(t, "127.0.0.1:0", attackOn("https://"+proxyDomain+":"+portUI, prefix, "await attack();\nreport();"))
		site.StartTLS()
		got := onDevice(t, "alice", portUI).visit(t, "https://dashboard.example.com", site, "MAP dashboard.example.com "+site.Listener.Addr().String())
		// The API server allows no origin to read answers.
		wantResults(t, got, map[string]string{"exec": "open", "watch": "open", "sandbox": "refused"})
		if names := created(t, prefix); len(names) == 0 {
			t.Error("the page created nothing")
		}
	})
	t.Run("DNS rebinding", func(t *testing.T) {
		b := onDevice(t, "alice", "80")
		out, err := b.command(t.Context(), t, []string{"MAP rebound.example.com " + b.address}, "--dump-dom", "http://rebound.example.com"+secretsPath).Output()
		if err != nil || !strings.Contains(string(out), "allow_hosts") {
			t.Errorf("%v: got %s; want a refusal", err, out)
		}
	})
}

// visitBoth is visit for a page of site that then leads to one of next.
func (b *browser) visitBoth(t *testing.T, url string, site, next *website, rules ...string) map[string]string {
	t.Helper()
	reports := make(chan map[string]string, 1)
	both := &website{reports: make(chan map[string]string)}
	go func() {
		select {
		case first := <-site.reports:
			reports <- first
		case <-t.Context().Done():
			return
		}
		select {
		case second := <-next.reports:
			both.reports <- second
		case <-t.Context().Done():
		}
	}()
	b.visit(t, url, both, rules...)
	return <-reports
}

// handshake returns a request that opens a WebSocket.
func handshake(path string, headers ...string) string {
	return get(path, append(headers, "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")...)
}

// statusOverTLS is [statusOf] for a site with TLS.
func statusOverTLS(t *testing.T, caller, port, raw string) int {
	t.Helper()
	conn := tls.Client(dial(t, theLab.Callers[caller].Server, lab.ProxyName+":"+port), &tls.Config{ServerName: proxyDomain, InsecureSkipVerify: true})
	if _, err := conn.Write([]byte(raw)); err != nil {
		t.Fatal(err)
	}
	return readStatus(t, conn, raw)
}

// Requests as well-known programs send them.
func TestOrigin_ProgramsWork(t *testing.T) {
	const (
		host     = "Host: " + proxyDomain
		uiHost   = host + ":" + portUI
		watch    = configMaps + "?watch=true&timeoutSeconds=5"
		freelens = "https://5a1e2f.renderer.freelens.app:40123"
		electron = "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Freelens/1.9.0 Chrome/156.0.0.0 Electron/43.0.0 Safari/537.36"
	)
	name := func(n string) string {
		return `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"generateName":"program-"},"data":{"a":"` + n + `"}}`
	}
	t.Cleanup(func() { created(t, "program-") })
	for _, tt := range []struct {
		name, port, raw string
		want            int
	}{
		{"Python websocket-client 1.2", "443", handshake(watch, host, "Origin: http://"+proxyDomain), 101},
		{"Python websocket-client 1.8", "443", handshake(watch, host, "Origin: https://"+proxyDomain), 101},
		{"Python websocket-client, plain HTTP", "80", handshake(watch, "Origin: http://"+lab.ProxyName), 101},
		{"fabric8's watch", "443", handshake(watch, host, "Origin: https://"+proxyDomain, "User-Agent: fabric8-kubernetes-client/7.4.0"), 101},
		{"fabric8's watch, with a port", "443", handshake(watch, host, "Origin: https://"+proxyDomain+":443", "User-Agent: fabric8-kubernetes-client/7.4.0"), 101},
		{"fabric8's watch without a WebSocket", "443", get(watch, host, "Origin: https://"+proxyDomain, "User-Agent: fabric8-kubernetes-client/7.4.0"), 200},
		{"Headlamp's watch", "443", handshake(watch, host, "Origin: https://"+proxyDomain), 101},
		{"Kubernetes' own tests", "443", handshake(watch, host, "Origin: http://localhost"), 101},
		{"Python through kubectl proxy", "443", handshake(watch, host, "Origin: http://127.0.0.1:8001"), 101},
		{"a program that names another site", "443", handshake(watch, host, "Origin: https://evil.example.com"), 403},

		{"Freelens reads, by default", "443", get(configMaps, host, electron, "Sec-Fetch-Site: same-origin", "Referer: "+freelens+"/"), 403},
		{"Freelens writes, by default", "443", request("POST", configMaps, name("x"), host, electron, "Sec-Fetch-Site: same-origin", "Origin: "+freelens), 403},
		{"Freelens reads", portUI, get(configMaps, uiHost, electron, "Sec-Fetch-Site: same-origin", "Referer: "+freelens+"/"), 200},
		{"Freelens writes", portUI, request("POST", configMaps, name("x"), uiHost, electron, "Sec-Fetch-Site: same-origin", "Origin: "+freelens), 201},
		{"Headlamp reads, by default", "443", get(configMaps, host, electron, "Sec-Fetch-Site: same-origin", "Referer: http://localhost:4466/c/main/pods"), 403},
		{"Headlamp reads", portUI, get(configMaps, uiHost, electron, "Sec-Fetch-Site: same-origin", "Referer: http://localhost:4466/c/main/pods"), 200},
		{"Headlamp writes", portUI, request("POST", configMaps, name("x"), uiHost, electron, "Sec-Fetch-Site: same-origin", "Origin: http://localhost:4466"), 201},
		{"Headlamp writes, at another port", portUI, request("POST", configMaps, name("x"), uiHost, electron, "Sec-Fetch-Site: same-origin", "Origin: http://localhost:4467"), 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status := statusOf
			if tt.port != "80" {
				status = statusOverTLS
			}
			if got := status(t, "alice", tt.port, tt.raw); got != tt.want {
				t.Errorf("got %d %s; want %d", got, http.StatusText(got), tt.want)
			}
		})
	}
}
