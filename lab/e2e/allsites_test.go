// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

const (
	proxyName   = lab.ProxyName + "." + lab.Domain
	belowPath   = lab.ProxyName + ":" + portBelowPath + "/cluster-a"
	secondSite  = secondNode + "." + lab.Domain + ":" + portSecondNode
	foreignPort = ":" + portForeignNode
)

// sitesOf returns the names of the sites that the page of the default site lists to a
// caller.
func sitesOf(t *testing.T, caller string) (names []string) {
	t.Helper()
	resp := send(t, caller, portDeviceUsers, get("/whoami", "Accept: application/json", "Host: "+proxyName+":"+portDeviceUsers))
	var facts whoami.Facts
	if err := json.Unmarshal([]byte(resp.body), &facts); err != nil {
		t.Fatalf("%s: %v\n%s", resp.Status, err, resp.body)
	}
	if facts.SitesIncomplete {
		t.Errorf("not every site has answered %s", caller)
	}
	for _, site := range facts.Sites {
		names = append(names, site.Name)
	}
	return names
}

// A caller learns of the sites on which it has an identity, also on another node, and of no
// other.
func TestSites_ListIsTheCallers(t *testing.T) {
	common := []string{proxyName, belowPath}                                              // for all callers
	readers := []string{proxyName + ":" + portDeviceLimits, proxyName + ":" + portNarrow} // require a group
	for _, tt := range []struct {
		caller string
		want   []string
	}{
		{"bob", slices.Concat(common, readers, []string{proxyName + ":" + portChoiceLimits, secondSite})},
		{"erin", slices.Concat(common, readers, []string{proxyName + ":" + portChoiceLimits})},
		{"dave", common},
		{"ops", slices.Concat(common, readers[1:], []string{proxyName + ":" + portChoiceLimits, secondSite})}, // deny_tags
	} {
		got := sitesOf(t, tt.caller)
		slices.Sort(tt.want)
		slices.Sort(got)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.caller, diff)
		}
	}
}

// On another tailnet, another device may have the caller's address.
func TestSites_OtherTailnetsDeviceIsNotTheCaller(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	callers := make(map[netip.Addr]string)
	for name, caller := range theLab.Callers {
		ip4, _ := caller.Server.TailscaleIPs()
		callers[ip4] = name
	}
	foreign, err := theLab.Caddy.Node(ctx, foreignNode)
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := foreign.TailscaleIPs()
	address := ip4.String() + foreignPort
	for i := range 8 {
		device := &tsnet.Server{
			Hostname: fmt.Sprintf("twin-%d", i), Dir: t.TempDir(), ControlURL: other.headscale.URL(), AuthKey: other.key, Ephemeral: true,
			Logf: func(string, ...any) {},
		}
		t.Cleanup(func() { _ = device.Close() })
		if _, err := device.Up(ctx); err != nil {
			t.Fatal(err)
		}
		ip4, _ := device.TailscaleIPs()
		caller, ok := callers[ip4]
		if !ok {
			continue
		}
		// The control: the site knows the device at this address.
		if resp := sendTo(t, device, address, get("/whoami", "Accept: application/json", "Host: "+address)); resp.StatusCode != http.StatusOK || !strings.Contains(resp.body, `"address": "`+ip4.String()+`"`) {
			t.Errorf("the site on the other tailnet: %s %s", resp.Status, resp.body)
		}
		for _, name := range sitesOf(t, caller) {
			if strings.HasSuffix(name, foreignPort) {
				t.Errorf("%s, at %v on its own tailnet, is told about %s", caller, ip4, name)
			}
		}
		return
	}
	t.Error("no device of the other tailnet has a caller's address")
}

// env returns the environment of a program that reaches the tailnet as a caller.
func env(t *testing.T, caller, kubeconfig string) []string {
	t.Helper()
	device, err := clientcmd.LoadFromFile(theLab.Callers[caller].Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	proxy := device.Clusters["lab"].ProxyURL
	return []string{"KUBECONFIG=" + kubeconfig, "HTTPS_PROXY=" + proxy, "HTTP_PROXY=" + proxy, "NO_PROXY="}
}

// kubeconfigCommand runs the command as a caller, in a process of its own.
func kubeconfigCommand(t *testing.T, caller, kubeconfig string, args ...string) (output string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, append([]string{"tailscale-impersonate", "kubeconfig"}, args...)...)
	cmd.Env = append(os.Environ(), append(env(t, caller, kubeconfig), ownCaddy+"=yes")...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// caFile returns the file of the authority of "tls internal".
func caFile(t *testing.T) string {
	t.Helper()
	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "root.crt")
	if err := os.WriteFile(file, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// One kubeconfig has all sites, one of them below a path and one on another node, and
// kubectl works with each. What the caller may no longer use is pruned.
func TestSites_CommandMergesAndPrunesAll(t *testing.T) {
	const mine = "apiVersion: v1\nkind: Config\ncurrent-context: mine\ncontexts:\n- name: mine\n  context: {cluster: mine, user: mine}\nclusters:\n- name: mine\n  cluster: {server: https://mine.example.com}\nusers:\n- name: mine\n  user: {token: secret}\n"
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(mine), 0o600); err != nil {
		t.Fatal(err)
	}
	merge := func(args ...string) string {
		t.Helper()
		out, err := kubeconfigCommand(t, "dave", file, append([]string{"--server", "https://" + proxyName, "--all", "--ca", caFile(t)}, args...)...)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return out
	}
	contexts := func() (names []string) {
		t.Helper()
		config, err := clientcmd.LoadFromFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for name := range config.Contexts {
			names = append(names, name)
		}
		if config.CurrentContext != "mine" || config.AuthInfos["mine"] == nil || config.AuthInfos["mine"].Token != "secret" || config.Clusters["mine"] == nil {
			t.Errorf("the user's own context has changed: %v", config)
		}
		slices.Sort(names)
		return names
	}
	usual := []string{belowPath, proxyName, proxyName + ":" + portDeviceUsers, "mine"}
	slices.Sort(usual)
	merge()
	if diff := cmp.Diff(usual, contexts()); diff != "" {
		t.Fatalf("contexts (-want +got):\n%s", diff)
	}

	withdraw := grantTo(t, "dave@example.com", "tailnet-readers")
	more := append(usual[:len(usual):len(usual)], proxyName+":"+portDeviceLimits, proxyName+":"+portNarrow,
		proxyName+":"+portChoiceLimits, proxyName+":"+portChoiceLimits+"-tailnet-tailnet-readers")
	slices.Sort(more)
	eventually(t, "dave has more contexts", func() error {
		merge()
		if diff := cmp.Diff(more, contexts()); diff != "" {
			return fmt.Errorf("contexts (-want +got):\n%s", diff)
		}
		return nil
	})
	// Nothing but the kubeconfig says what kubectl trusts.
	for _, name := range more {
		if name == "mine" || name == proxyName+":"+portChoiceLimits { // which needs a group to be asked for
			continue
		}
		stdout, stderr, err := runKubectl(t, file, append(env(t, "dave", file), noRoots(t)...), "--context", name, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}")
		if err != nil || !strings.HasSuffix(stdout, "dave@example.com") {
			t.Errorf("kubectl --context %s: %v: %s%s", name, err, stdout, stderr)
		}
	}
	if stdout, stderr, err := runKubectl(t, file, env(t, "dave", file), "--context", belowPath, "get", "pods", "-o", "name"); err != nil || !strings.Contains(stdout, "pod/"+lab.Pod) {
		t.Errorf("kubectl get pods below the path: %v: %s%s", err, stdout, stderr)
	}

	withdraw()
	eventually(t, "the contexts are pruned", func() error {
		out := merge("--prune")
		if diff := cmp.Diff(usual, contexts()); diff != "" {
			return fmt.Errorf("%s contexts (-want +got):\n%s", out, diff)
		}
		return nil
	})
}

// Two sites of two nodes, in the file that curl downloads from either of them.
func TestSites_DownloadHasAll(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("there is no curl on this machine")
	}
	for _, site := range []string{secondSite, proxyName} {
		file := filepath.Join(t.TempDir(), "config")
		cmd := exec.CommandContext(t.Context(), curl, "-fsS", "--cacert", caFile(t), "https://"+site+"/whoami?kubeconfig", "-o", file)
		cmd.Env = append(os.Environ(), env(t, "bob", "")...)
		for i, variable := range cmd.Env { // socks5h resolves names on the tailnet
			cmd.Env[i] = strings.Replace(variable, "_PROXY=socks5:", "_PROXY=socks5h:", 1)
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("curl: %v: %s", err, out)
		}
		config, err := clientcmd.LoadFromFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if config.CurrentContext != site {
			t.Errorf("from %s: the current context is %s", site, config.CurrentContext)
		}
		for _, name := range []string{proxyName, secondSite, belowPath} {
			stdout, stderr, err := runKubectl(t, file, append(env(t, "bob", file), noRoots(t)...), "--context", name, "auth", "whoami", "-o", "jsonpath={.status.userInfo.groups}")
			want := "tailnet-readers"
			if name == secondSite {
				want = "second-readers"
			}
			if err != nil || !strings.Contains(stdout, want) {
				t.Errorf("from %s: kubectl --context %s: %v: %s%s; want the group %s", site, name, err, stdout, stderr, want)
			}
		}
	}
}

// The API server has redirects lead to below its own path of an application, and redirects
// there itself. The site's path is in front of that.
func TestSites_RedirectsKeepPathOfSite(t *testing.T) {
	app, path := servePodApp(t, "")
	app.Config.Handler = http.RedirectHandler("/login?next=%2F", http.StatusFound)
	for _, tt := range []struct{ path, want string }{
		{strings.TrimSuffix(path, "/"), path},
		{path, path + "login?next=%2F"},
	} {
		resp := send(t, "alice", portBelowPath, get("/cluster-a"+tt.path, "Host: "+lab.ProxyName+":"+portBelowPath))
		if got, want := resp.Header.Get("Location"), "/cluster-a"+tt.want; got != want || resp.StatusCode/100 != 3 {
			t.Errorf("%s: %s %s to %q; want a redirect to %q", tt.path, resp.Status, resp.body, got, want)
		}
	}
}
