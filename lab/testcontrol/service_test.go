// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	tailscalecontrol "tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

const (
	serviceName = tailcfg.ServiceName("svc:k8s-api")
	serviceHost = "k8s-api." + domain
)

var (
	serviceAddr      = netip.MustParseAddr("100.100.7.7")
	otherServiceAddr = netip.MustParseAddr("100.100.8.8")
)

// A caller who dials a service is known by its own address, over each protocol, and has
// what it is granted on the service.
func TestService_CallersAreKnown(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("https://"+serviceHost+", http://", "tailscale-service/k8s/k8s-api"))
	l.allowHost(l.node("k8s"), serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")

	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		client := l.client(l.caller, serviceAddr, protocol)
		resp := l.get(client, "https://"+serviceHost+"/api")
		if resp.Proto != protocol {
			t.Errorf("got an answer over %s; want %s", resp.Proto, protocol)
		}
		if got, want := resp.Header.Get("Saw-User"), "caller."+domain; got != want {
			t.Errorf("over %s, the API server sees user %q; want %q", protocol, got, want)
		}
	}
	upgraded := l.upgrade()
	if got := upgraded.user; got != "caller."+domain {
		t.Errorf("on an upgraded connection, the API server sees user %q; want the caller", got)
	}
	if err := upgraded.echo(); err != nil {
		t.Error(err)
	}

	// Over plain HTTP, the name and the address of the service are those of the server.
	plain := l.client(l.caller, serviceAddr, "HTTP/1.1")
	for host, want := range map[string]int{
		serviceHost:          http.StatusOK,
		"k8s-api":            http.StatusOK,
		serviceAddr.String(): http.StatusOK,
		"web.example.com":    http.StatusForbidden,
		"k8s-api.other.net":  http.StatusForbidden,
		"100.100.7.8":        http.StatusForbidden,
	} {
		resp, err := plain.Get("http://" + host + "/api")
		if err != nil {
			t.Errorf("host %s: %v", host, err)
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("host %s: got status %d; want %d", host, resp.StatusCode, want)
		}
	}
}

// A grant whose destination is the service counts on the service, and not on the address
// of the node that hosts it.
func TestService_GrantsAreThoseOnTheService(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("http://", "tailscale-service/k8s/k8s-api", "tailscale/k8s"))
	node := l.node("k8s")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")

	ip4, _ := node.TailscaleIPs()
	grant := func(dst netip.Addr, group string) tailcfg.FilterRule {
		return tailcfg.FilterRule{SrcIPs: []string{"*"}, CapGrant: []tailcfg.CapGrant{{
			Dsts: []netip.Prefix{netip.PrefixFrom(dst, dst.BitLen())},
			CapMap: tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: {
				tailcfg.RawMessage(fmt.Sprintf(`{"impersonate":{"groups":[%q]}}`, group)),
			}},
		}}}
	}
	if !l.control.AddRawMapResponse(l.key(node), &tailcfg.MapResponse{
		PacketFilter: append(slices.Clone(tailcfg.FilterAllowAll), grant(serviceAddr, "on-service"), grant(ip4, "on-node")),
	}) {
		t.Fatal("the control server has lost the node")
	}
	for addr, want := range map[netip.Addr]string{serviceAddr: "on-service", ip4: "on-node"} {
		client := l.client(l.caller, addr, "HTTP/1.1")
		l.until("the caller has the groups that it is granted on "+addr.String(), func() error {
			resp, err := client.Get("http://" + addr.String() + "/api")
			if err != nil {
				return err
			}
			_ = resp.Body.Close()
			if got := resp.Header["Saw-Group"]; !slices.Equal(got, []string{want}) {
				return fmt.Errorf("got groups %q with status %d; want %s", got, resp.StatusCode, want)
			}
			return nil
		})
		// Its page and the administrator's command say which of them it dialled.
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr.String()+"/whoami", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept", "application/json")
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		var facts whoami.Facts
		if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if wantService := map[netip.Addr]string{serviceAddr: "k8s-api"}[addr]; facts.Service != wantService || facts.Proxy != "k8s" {
			t.Errorf("at %v, the page names node %q and service %q; want node k8s and service %q", addr, facts.Proxy, facts.Service, wantService)
		}
	}
	process := app.Acquire()
	defer process.Release()
	explained := make(map[string]string)
	for _, authenticator := range process.Running() {
		all, err := authenticator.ExplainPeer(t.Context(), "caller")
		if err != nil {
			t.Error(err)
		}
		for _, f := range all {
			for _, group := range f.Groups {
				explained[f.Service] += group.Name
			}
		}
	}
	if want := map[string]string{"": "on-node", "k8s-api": "on-service"}; !maps.Equal(explained, want) {
		t.Errorf("explained are groups %q by service; want %q", explained, want)
	}
}

// A config that replaces another keeps the service, and its connections. One without the
// service takes it back, and nothing else that is set on the node.
func TestService_IsTakenBackWithItsSite(t *testing.T) {
	l := newServiceLab(t)
	own := l.site("http://", "tailscale/k8s")
	l.load(own)
	node := l.node("k8s")
	client, err := node.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	// What another program has set.
	foreign := func() *ipn.ServeConfig {
		return &ipn.ServeConfig{
			TCP: map[uint16]*ipn.TCPPortHandler{8443: {TCPForward: "127.0.0.1:1"}},
			Services: map[tailcfg.ServiceName]*ipn.ServiceConfig{
				"svc:other": {TCP: map[uint16]*ipn.TCPPortHandler{80: {TCPForward: "127.0.0.1:1"}}},
				serviceName: {TCP: map[uint16]*ipn.TCPPortHandler{8080: {TCPForward: "127.0.0.1:1"}}},
			},
		}
	}
	if err := client.SetServeConfig(t.Context(), foreign()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.EditPrefs(t.Context(), &ipn.MaskedPrefs{AdvertiseServicesSet: true, Prefs: ipn.Prefs{AdvertiseServices: []string{"svc:other"}}}); err != nil {
		t.Fatal(err)
	}

	both := own + l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api")
	l.load(both)
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	want := foreign()
	want.Services[serviceName].TCP[443] = new(ipn.TCPPortHandler)
	l.wantSettings(node, want, "svc:other", string(serviceName))
	caller := l.client(l.caller, serviceAddr, "HTTP/1.1")
	l.get(caller, "https://"+serviceHost+"/api")

	stream := l.upgrade()
	// A second config, which differs, and the first again.
	l.load(both + "\n# changed\nhttp://changed.example.com {\n\tbind tailscale/k8s\n\trespond changed\n}\n")
	l.load(both)
	l.wantSettings(node, want, "svc:other", string(serviceName))
	for range 5 {
		caller.CloseIdleConnections()
		l.get(caller, "https://"+serviceHost+"/api")
	}

	if err := stream.echo(); err != nil {
		t.Errorf("after the reloads: %v", err)
	}

	// Somebody clears the settings, as tsnet does when it is first asked to come up.
	if err := client.SetServeConfig(t.Context(), foreign()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.EditPrefs(t.Context(), &ipn.MaskedPrefs{AdvertiseServicesSet: true, Prefs: ipn.Prefs{AdvertiseServices: []string{"svc:other"}}}); err != nil {
		t.Fatal(err)
	}
	l.until("the settings are repaired", func() error { return l.settings(node, want, "svc:other", string(serviceName)) })

	began := time.Now()
	l.forget()
	l.load(own)
	l.awaitLog("streams ended") // at once, and not when the caller is checked again
	if _, err := stream.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > time.Minute {
		t.Errorf("%v after its service is gone, a stream ends with %v; want its end", time.Since(began), err)
	}
	l.wantSettings(node, foreign(), "svc:other", string(serviceName))
	// Another program still serves a port of the service, so it is still offered. Nothing
	// answers on the port of the site.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if c, err := lab.Dial(ctx, l.caller, "tcp", serviceAddr.String()+":443"); err == nil {
		_ = c.Close()
		t.Error("without its site, the service still takes connections")
	}
}

// A site that leaves its port ends the streams there, though the service is still hosted on
// another port: the node no longer takes their packets.
func TestService_StreamsEndWithTheirPort(t *testing.T) {
	l := newServiceLab(t)
	other := l.site("https://"+serviceHost+":8443", "tailscale-service/k8s/k8s-api")
	l.load(other + l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	l.allowHost(l.node("k8s"), serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	l.awaitLog("a Tailscale Service is hosted")
	l.get(l.client(l.caller, serviceAddr, "HTTP/1.1"), "https://"+serviceHost+"/api")
	stream := l.upgrade()
	l.forget()
	l.load(other)
	l.awaitLog("streams ended")
	if _, err := stream.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stream on the port that is gone ends with %v; want its end", err)
	}
	l.get(l.client(l.caller, serviceAddr, "HTTP/1.1"), "https://"+serviceHost+":8443/api")
}

// Who may no longer connect to the service loses its streams, and what it sends on
// connections that are open is refused.
func TestService_LostAccessEndsStreams(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	node := l.node("k8s")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	client := l.client(l.caller, serviceAddr, "HTTP/2.0")
	l.get(client, "https://"+serviceHost+"/api")
	stream := l.upgrade()
	// The node's own address is left to everybody.
	ip4, ip6 := node.TailscaleIPs()
	own := tailcfg.FilterRule{SrcIPs: []string{"*"}, DstPorts: []tailcfg.NetPortRange{
		{IP: ip4.String(), Ports: tailcfg.PortRangeAny}, {IP: ip6.String(), Ports: tailcfg.PortRangeAny},
	}}
	if !l.control.AddRawMapResponse(l.key(node), &tailcfg.MapResponse{PacketFilter: []tailcfg.FilterRule{own}}) {
		t.Fatal("the control server has lost the node")
	}
	l.until("a request on the open connection is refused", func() error {
		resp, err := client.Get("https://" + serviceHost + "/api")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusForbidden || !strings.Contains(string(body), "not_admitted")) {
			err = fmt.Errorf("got status %d: %s", resp.StatusCode, body)
		}
		return err
	})
	l.awaitLog("open requests ended")
	if _, err := stream.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stream ends with %v; want its end", err)
	}
}

// The last port of a service takes its offer with it.
func TestService_IsNoLongerOffered(t *testing.T) {
	l := newServiceLab(t)
	own := l.site("http://", "tailscale/k8s")
	l.load(own + l.site("https://"+serviceHost+", http://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	node := l.node("k8s")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	l.until("both ports are served", func() error {
		return l.settings(node, &ipn.ServeConfig{Services: map[tailcfg.ServiceName]*ipn.ServiceConfig{
			serviceName: {TCP: map[uint16]*ipn.TCPPortHandler{443: {}, 80: {}}},
		}}, string(serviceName))
	})
	if got, want := l.told(node), "svc:k8s-api active"; got != want {
		t.Errorf("the control server is told %q; want %q", got, want)
	}
	// A part of it stays as long as a port does.
	l.load(own + l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	l.wantSettings(node, &ipn.ServeConfig{Services: map[tailcfg.ServiceName]*ipn.ServiceConfig{
		serviceName: {TCP: map[uint16]*ipn.TCPPortHandler{443: {}}},
	}}, string(serviceName))
	l.load(own)
	l.wantSettings(node, new(ipn.ServeConfig))
	if got := l.told(node); got != "" {
		t.Errorf("the control server is told %q; want nothing", got)
	}
}

// The control server decides which node may host a service, and at which address.
func TestService_FollowsTheControlServer(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	node := l.node("k8s")
	l.awaitLog("the node has no tag, and only tagged nodes may host a service")
	l.tag(node)
	l.awaitLog("the control server does not let the node host the service")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	client := l.client(l.caller, serviceAddr, "HTTP/1.1")
	l.get(client, "https://"+serviceHost+"/api")

	// Another address. Requests on the connections to the old one are refused, if they
	// still arrive.
	l.allowHost(node, otherServiceAddr)
	l.awaitLog(otherServiceAddr.String())
	l.get(l.client(l.caller, otherServiceAddr, "HTTP/1.1"), "https://"+serviceHost+"/api")
	client.Timeout = 2 * time.Second
	if resp, err := client.Get("https://" + serviceHost + "/api"); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			t.Error("a request to an address that the service had is answered")
		}
	}

	l.forget()
	l.control.SetNodeCapMap(l.key(node), tailcfg.NodeCapMap{})
	l.awaitLog("the control server does not let the node host the service")
	if addrs := l.listening(node); len(addrs) > 0 {
		t.Errorf("the node still listens on %v", addrs)
	}
	// And it may again.
	l.allowHost(node, serviceAddr)
	l.get(l.client(l.caller, serviceAddr, "HTTP/2.0"), "https://"+serviceHost+"/api")
}

// A port that another program has the node handle stays with that, and the log says so.
func TestService_LeavesThePortsOfOthers(t *testing.T) {
	l := newServiceLab(t)
	own := l.site("http://", "tailscale/k8s")
	l.load(own)
	node := l.node("k8s")
	client, err := node.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	theirs := &ipn.ServeConfig{Services: map[tailcfg.ServiceName]*ipn.ServiceConfig{
		serviceName: {TCP: map[uint16]*ipn.TCPPortHandler{443: {TCPForward: "127.0.0.1:1"}}},
	}}
	if err := client.SetServeConfig(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	l.load(own + l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	l.allowHost(node, serviceAddr)
	l.awaitLog("handles port 443 of svc:k8s-api in another way")
	l.load(own)
	l.wantSettings(node, theirs)
}

// A service is drained before anything ends. The control server is told, and what still
// comes is answered.
func TestService_IsDrained(t *testing.T) {
	l := newServiceLab(t)
	l.load(l.site("https://"+serviceHost, "tailscale-service/k8s/k8s-api"))
	node := l.node("k8s")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	stream := l.upgrade()
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		t.Fatal(err)
	}
	var listeners []net.Listener
	for _, server := range app.(*caddyhttp.App).Servers {
		listeners = append(listeners, server.Listeners()...)
	}
	if err := tailnet.FromListeners(listeners).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := l.told(node), "svc:k8s-api drained"; got != want {
		t.Errorf("the control server is told %q; want %q", got, want)
	}
	// Nothing that happens on the node makes it offer the service again.
	l.tag(node)
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		l.get(l.client(l.caller, serviceAddr, protocol), "https://"+serviceHost+"/api")
	}
	if err := stream.echo(); err != nil {
		t.Error(err)
	}
	if got, want := l.told(node), "svc:k8s-api drained"; got != want {
		t.Errorf("the control server is told %q; want %q", got, want)
	}
}

// Two nodes of one server that both host the service own its address, so that a connection
// does not tell which of them accepted it. On servers of their own they are two replicas.
func TestService_TwoHosts(t *testing.T) {
	l := newServiceLab(t)
	one, two := l.site("http://", "tailscale-service/one/k8s-api"), l.site("http://", "tailscale-service/two/k8s-api")
	l.load(one + two)
	l.allowHost(l.node("one"), serviceAddr)
	l.allowHost(l.node("two"), serviceAddr)
	client := l.client(l.caller, serviceAddr, "HTTP/1.1")
	for _, name := range []string{"one", "two"} {
		l.route(l.node(name), serviceAddr)
		l.get(client, "http://"+serviceHost+"/api")
		client.CloseIdleConnections()
	}

	l.load(l.site("http://", "tailscale-service/one/k8s-api", "tailscale-service/two/k8s-api"))
	l.until("the request is refused, and says why", func() error {
		resp, err := client.Get("http://" + serviceHost + "/api")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusForbidden || !strings.Contains(string(body), `both own the address `+serviceAddr.String())) {
			err = fmt.Errorf("got status %d: %s", resp.StatusCode, body)
		}
		return err
	})
}

// serviceLab is a tailnet with a control server that can let nodes host a service, a
// caller, and an upstream that answers with whom it sees.
type serviceLab struct {
	*testing.T
	control  *tailscalecontrol.Server
	caller   *tsnet.Server
	upstream string
	dir, log string
	running  bool
	from     int // where in the log awaitLog looks
}

// newServiceLab returns one whose nodes may ask for certificates for these domains, and for
// their own.
func newServiceLab(t *testing.T, certDomains ...string) *serviceLab {
	t.Helper()
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	control := &tailscalecontrol.Server{DERPMap: derptest.Start(t), DNSConfig: &tailcfg.DNSConfig{Proxied: true, CertDomains: certDomains}, MagicDNSDomain: domain, Logf: logger.Discard}
	control.HTTPTestServer = httptest.NewServer(control)
	t.Cleanup(control.HTTPTestServer.Close)
	control.SetGlobalAppCaps(tailcfg.PeerCapMap{})
	upstream := httptest.NewServer(http.HandlerFunc(answer))
	t.Cleanup(upstream.Close)
	l := &serviceLab{
		T: t, control: control, upstream: strings.TrimPrefix(upstream.URL, "http://"),
		dir: tempdir.New(t), log: filepath.Join(t.TempDir(), "log"),
	}
	l.caller = join(t, control.HTTPTestServer.URL, "caller")
	status, err := l.caller.Up(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client, err := l.caller.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.EditPrefs(t.Context(), &ipn.MaskedPrefs{RouteAllSet: true, Prefs: ipn.Prefs{RouteAll: true}}); err != nil {
		t.Fatal(err)
	}
	node := control.Node(status.Self.PublicKey)
	node.Name, node.Tags = "caller."+domain+".", []string{"tag:caller"}
	control.UpdateNode(node)
	control.AddDNSRecords(tailcfg.DNSRecord{Name: serviceHost, Value: serviceAddr.String()})
	return l
}

// answer says whom it sees, and echoes on an upgraded connection.
func answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Saw-User", r.Header.Get("Impersonate-User"))
	w.Header()["Saw-Group"] = r.Header["Impersonate-Group"]
	if r.Header.Get("Upgrade") == "" {
		return
	}
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", r.Header.Get("Upgrade"))
	w.WriteHeader(http.StatusSwitchingProtocols)
	c, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = io.Copy(c, buffered)
}

// site returns a site of a Caddyfile.
func (l *serviceLab) site(address string, bind ...string) string {
	tlsOption := ""
	if strings.Contains(address, "https:") {
		tlsOption = "tls internal"
	}
	sites := ""
	for one := range strings.SplitSeq(address, ", ") {
		option := tlsOption
		if strings.HasPrefix(one, "http:") {
			option = ""
		}
		sites += fmt.Sprintf(`
%s {
	bind %s
	%s
	tailscale_impersonate {
		cache_ttl 0
		whoami
	}
	reverse_proxy %s {
		stream_close_delay 1m
	}
}
`, one, strings.Join(bind, " "), option, l.upstream)
	}
	return sites
}

// load runs Caddy with sites.
func (l *serviceLab) load(sites string) {
	l.Helper()
	config, err := lab.Adapt(fmt.Sprintf(`{
	admin off
	persist_config off
	auto_https disable_redirects
	skip_install_trust
	storage file_system %[1]s
	log default {
		output file %[2]s
		format json
	}
	tailscale {
		control_url %[3]s
		auth_key unused
		state_dir %[4]s
	}
	servers {
		protocols h1 h2
	}
}
`, filepath.Join(l.dir, "caddy"), l.log, l.control.HTTPTestServer.URL, l.dir) + sites)
	if err != nil {
		l.Fatal(err)
	}
	if !l.running {
		l.running = true
		l.Cleanup(func() {
			if err := caddy.Stop(); err != nil {
				l.Errorf("stopping Caddy: %v", err)
			}
		})
	}
	if err := caddy.Load(config, true); err != nil {
		l.Fatal(err)
	}
}

// node returns Caddy's node of that name.
func (l *serviceLab) node(name string) *tsnet.Server {
	l.Helper()
	node, ok := standin.Node(name)
	if !ok {
		l.Fatalf("Caddy has no node %s", name)
	}
	l.until(name+" is on the tailnet", func() error {
		client, err := node.LocalClient()
		if err != nil {
			return err
		}
		status, err := client.StatusWithoutPeers(l.Context())
		if err == nil && status.BackendState != ipn.Running.String() {
			err = fmt.Errorf("it is %s", status.BackendState)
		}
		return err
	})
	return node
}

func (l *serviceLab) key(node *tsnet.Server) key.NodePublic {
	l.Helper()
	client, err := node.LocalClient()
	if err != nil {
		l.Fatal(err)
	}
	status, err := client.StatusWithoutPeers(l.Context())
	if err != nil {
		l.Fatal(err)
	}
	return status.Self.PublicKey
}

func (l *serviceLab) tag(node *tsnet.Server) {
	l.Helper()
	n := l.control.Node(l.key(node))
	n.Name, n.Tags = node.Hostname+"."+domain+".", []string{"tag:k8s"}
	l.control.UpdateNode(n)
}

// allowHost tags node and lets it host the service, at addr, to which the tailnet's traffic
// then goes.
func (l *serviceLab) allowHost(node *tsnet.Server, addr netip.Addr) {
	l.Helper()
	l.tag(node)
	hosted, err := json.Marshal(tailcfg.ServiceIPMappings{serviceName: {addr}})
	if err != nil {
		l.Fatal(err)
	}
	l.control.SetNodeCapMap(l.key(node), tailcfg.NodeCapMap{tailcfg.NodeAttrServiceHost: {tailcfg.RawMessage(hosted)}})
	l.route(node, addr)
}

// route makes node the one that gets the traffic to addr, as the control server does with
// a host of a service that has not been drained.
func (l *serviceLab) route(node *tsnet.Server, addr netip.Addr) {
	l.Helper()
	for _, other := range l.control.AllNodes() {
		if other.Key != l.key(node) {
			l.control.SetSubnetRoutes(other.Key, nil)
		}
	}
	l.control.SetSubnetRoutes(l.key(node), []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())})
}

// client returns a client that dials addr from node.
func (l *serviceLab) client(node *tsnet.Server, addr netip.Addr, protocol string) *http.Client {
	transport := &http.Transport{
		Protocols: new(http.Protocols),
		// Caddy's own authority issues the certificate.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			ctx, cancel := context.WithTimeout(ctx, 12*time.Second)
			defer cancel()
			return lab.Dial(ctx, node, "tcp", net.JoinHostPort(addr.String(), port))
		},
	}
	transport.Protocols.SetHTTP1(protocol == "HTTP/1.1")
	transport.Protocols.SetHTTP2(protocol == "HTTP/2.0")
	l.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 15 * time.Second}
}

// get requests url until it is answered with 200.
func (l *serviceLab) get(client *http.Client, url string) (resp *http.Response) {
	l.Helper()
	l.until(url+" is answered", func() (err error) {
		if resp, err = client.Get(url); err != nil {
			return err
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return nil
	})
	return resp
}

// upgraded is an upgraded connection.
type upgraded struct {
	net.Conn
	r    *bufio.Reader
	user string // whom the upstream saw
}

// upgrade opens an upgraded connection to the service.
func (l *serviceLab) upgrade() *upgraded {
	l.Helper()
	var plain net.Conn
	l.until("the caller reaches the service", func() (err error) {
		plain, err = lab.Dial(l.Context(), l.caller, "tcp", serviceAddr.String()+":443")
		return err
	})
	// Caddy's own authority issues the certificate.
	c := tls.Client(plain, &tls.Config{ServerName: serviceHost, InsecureSkipVerify: true})
	l.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		l.Fatal(err)
	}
	_, _ = fmt.Fprintf(c, "GET /api/v1/namespaces/default/pods/web/portforward HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", serviceHost)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		l.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		l.Fatalf("got status %s; want an upgrade", resp.Status)
	}
	return &upgraded{c, r, resp.Header.Get("Saw-User")}
}

// echo uses the connection.
func (u *upgraded) echo() error {
	if _, err := io.WriteString(u, "echo\n"); err != nil {
		return fmt.Errorf("the upgraded connection has ended: %w", err)
	}
	if line, err := u.r.ReadString('\n'); line != "echo\n" {
		return fmt.Errorf("the upgraded connection answers %q, %w", line, err)
	}
	return nil
}

// settings returns how those of node differ from what is wanted.
func (l *serviceLab) settings(node *tsnet.Server, want *ipn.ServeConfig, offered ...string) error {
	client, err := node.LocalClient()
	if err != nil {
		return err
	}
	config, err := client.GetServeConfig(l.Context())
	if err != nil {
		return err
	}
	config.ETag = ""
	got, _ := json.Marshal(config)
	wanted, _ := json.Marshal(want)
	prefs, err := client.GetPrefs(l.Context())
	if err != nil {
		return err
	}
	if string(got) != string(wanted) || !slices.Equal(prefs.AdvertiseServices, offered) {
		return fmt.Errorf("got %s, offering %q; want %s, offering %q", got, prefs.AdvertiseServices, wanted, offered)
	}
	return nil
}

func (l *serviceLab) wantSettings(node *tsnet.Server, want *ipn.ServeConfig, offered ...string) {
	l.Helper()
	if err := l.settings(node, want, offered...); err != nil {
		l.Errorf("settings of the node: %v", err)
	}
}

// told returns what node answers the control server that asks for its services.
func (l *serviceLab) told(node *tsnet.Server) string {
	l.Helper()
	client := &http.Client{Transport: l.control.NodeRoundTripper(l.key(node)), Timeout: 10 * time.Second}
	resp, err := client.Get("http://node/vip-services")
	if err != nil {
		l.Fatal(err)
	}
	defer resp.Body.Close()
	var services tailcfg.C2NVIPServicesResponse
	if err := json.NewDecoder(resp.Body).Decode(&services); err != nil {
		l.Fatal(err)
	}
	var told []string
	for _, s := range services.VIPServices {
		state := " drained"
		if s.Active {
			state = " active"
		}
		told = append(told, string(s.Name)+state)
	}
	return strings.Join(told, ", ")
}

// listening returns on which of the addresses of the service the node takes connections.
func (l *serviceLab) listening(node *tsnet.Server) (addrs []netip.Addr) {
	for _, addr := range []netip.Addr{serviceAddr, otherServiceAddr} {
		ln, err := node.Listen("tcp", addr.String()+":443")
		if err != nil {
			addrs = append(addrs, addr)
			continue
		}
		_ = ln.Close()
	}
	return addrs
}

// awaitLog waits until Caddy's log contains text behind what was found or forgotten before.
func (l *serviceLab) awaitLog(text string) {
	l.Helper()
	l.until(fmt.Sprintf("the log says %q", text), func() error {
		log, err := os.ReadFile(l.log)
		if err != nil {
			return err
		}
		i := strings.Index(string(log[l.from:]), text)
		if i < 0 {
			return fmt.Errorf("the log says:\n%s", log[l.from:])
		}
		l.from += i + len(text)
		return nil
	})
}

// forget makes awaitLog look only at what is logged from now on.
func (l *serviceLab) forget() {
	l.Helper()
	log, err := os.ReadFile(l.log)
	if err != nil {
		l.Fatal(err)
	}
	l.from = len(log)
}

// until waits until f returns nil.
func (l *serviceLab) until(what string, f func() error) {
	l.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.Fatalf("it is not so that %s: %v", what, err)
		}
	}
}
