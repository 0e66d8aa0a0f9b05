// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"k8s.io/client-go/tools/clientcmd"
	"tailscale.com/net/socks5"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// ownCaddy is the environment variable that makes the test's binary a Caddy.
const ownCaddy = "LAB_TESTCONTROL_CADDY"

func TestMain(m *testing.M) {
	if os.Getenv(ownCaddy) != "" {
		caddycmd.Main()
		return
	}
	os.Exit(m.Run())
}

// A caller of one site is told of a site on a service, with what it is granted on the
// service, and its kubeconfigs have the service's name. Two replicas are one site.
func TestSites_ServiceIsListed(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api") +
		l.site("https://"+serviceHost, "tailscale-service/two/k8s-api") +
		l.site("http://", "tailscale/k8s"))
	node, second := l.node("k8s"), l.node("two")
	l.tag(node)
	l.tag(second)
	ip4, _ := node.TailscaleIPs()
	client := l.client(l.caller, ip4, "HTTP/1.1")
	page := func() (*whoami.Facts, error) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ip4.String()+"/whoami", nil)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Accept", "application/json")
		resp, err := client.Do(r)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		facts := new(whoami.Facts)
		return facts, json.NewDecoder(resp.Body).Decode(facts)
	}
	// What the caller is granted there is not known before the service has an address.
	l.until("the list is incomplete", func() error {
		facts, err := page()
		if err == nil && (!facts.SitesIncomplete || len(facts.Sites) > 0) {
			err = fmt.Errorf("it lists %+v, incomplete: %t", facts.Sites, facts.SitesIncomplete)
		}
		return err
	})

	file := filepath.Join(t.TempDir(), "config")
	if out, err := l.command(file, "tailscale-impersonate", "kubeconfig", "--server", "http://"+ip4.String(), "--all", "--prune"); err == nil || !strings.Contains(out, "nothing is changed") {
		t.Errorf("pruning with an incomplete list: %v: %s", err, out)
	}

	l.allowHost(second, serviceAddr)
	l.allowHost(node, serviceAddr)
	for _, host := range []*tsnet.Server{second, node} {
		if !l.control.AddRawMapResponse(l.key(host), &tailcfg.MapResponse{
			PacketFilter: append(slices.Clone(tailcfg.FilterAllowAll), tailcfg.FilterRule{SrcIPs: []string{"*"}, CapGrant: []tailcfg.CapGrant{{
				Dsts:   []netip.Prefix{netip.PrefixFrom(serviceAddr, serviceAddr.BitLen())},
				CapMap: tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: {`{"impersonate":{"groups":["on-service"]}}`}},
			}}}),
		}) {
			t.Fatal("the control server has lost the node")
		}
	}
	l.until("the service is listed, with the caller's groups there", func() error {
		facts, err := page()
		if err != nil {
			return err
		}
		if facts.SitesIncomplete || len(facts.Sites) != 1 || len(facts.Groups) != 1 || facts.Groups[0].Name != "tag:caller" {
			return fmt.Errorf("the page lists %d sites, incomplete: %t, and the groups %v", len(facts.Sites), facts.SitesIncomplete, facts.Groups)
		}
		site := facts.Sites[0]
		if site.Name != serviceHost || site.Server != "https://"+serviceHost || site.Service != "k8s-api" || site.User != "caller."+domain ||
			!slices.Equal(site.Groups, []string{"on-service"}) || site.CertificateAuthority == "" {
			return fmt.Errorf("the site is %+v", site)
		}
		return nil
	})

	// The context of the downloaded file leads to the service.
	resp := l.get(client, "http://"+ip4.String()+"/whoami?kubeconfig&site="+serviceHost)
	if resp.Header.Get("Content-Disposition") != `attachment; filename="`+serviceHost+`.kubeconfig"` {
		t.Errorf("the file is named %q", resp.Header.Get("Content-Disposition"))
	}

	// So does the one that the command merges.
	out, err := l.command(file, "tailscale-impersonate", "kubeconfig", "--server", "http://"+ip4.String(), "--all")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	config, err := clientcmd.LoadFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if c := config.Contexts[serviceHost]; c == nil || config.Clusters[c.Cluster].Server != "https://"+serviceHost || len(config.Clusters[c.Cluster].CertificateAuthorityData) == 0 {
		t.Errorf("after %s, the kubeconfig has %v", out, config.Contexts)
	}
}

// command runs Caddy in a process of its own, which reaches the tailnet as the caller.
func (l *serviceLab) command(kubeconfig string, args ...string) (output string, err error) {
	l.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		l.Fatal(err)
	}
	defer ln.Close()
	proxy := &socks5.Server{Logf: logger.Discard, Dialer: func(ctx context.Context, network, address string) (net.Conn, error) {
		return lab.Dial(ctx, l.caller, network, address)
	}}
	go func() { _ = proxy.Serve(ln) }() // until the listener is closed
	self, err := os.Executable()
	if err != nil {
		l.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(l.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), ownCaddy+"=yes", "KUBECONFIG="+kubeconfig, "HTTP_PROXY=socks5://"+ln.Addr().String(), "NO_PROXY=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
