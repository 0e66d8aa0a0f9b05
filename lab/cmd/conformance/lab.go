// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/conformance"
)

// The caller, and the proxy's name on the tailnet.
const (
	proxyHost   = lab.ProxyName + "." + lab.Domain
	callerLogin = "bob@example.com"
	callerGroup = "tailnet-readers"
	proxyToken  = "the-proxys-own"
)

// site is a site of the lab's Caddy.
type site struct {
	// port serves plain HTTP, and tlsPort TLS.
	port, tlsPort uint16
	name, body    string
	// authorization is the proxy's own header, empty if it has none.
	authorization string
	// pitfall and nobody are as in [conformance.Proxy].
	pitfall string
	nobody  bool
	// fails says that some attacks have to succeed.
	fails bool
	// options are the server options for plain HTTP, and binds are further addresses
	// that it listens on besides the proxy's node.
	options, binds string
	// http3 says that its TLS server also speaks HTTP/3.
	http3 bool
}

// labSites returns the sites of the lab. plain and encrypted are the addresses of
// the recorder, kubeconfig is for the latter. Ports are numbered from first, which
// must also be free on loopback, where the first site listens too.
func labSites(first uint16, plain, encrypted, kubeconfig string) []site {
	handler := func(mode string) string {
		return "\ttailscale_impersonate {\n\t\tclient_impersonation " + mode + "\n\t}\n"
	}
	toPlain := "\treverse_proxy " + plain + "\n"
	toEncrypted := func(more string) string {
		return "\treverse_proxy " + encrypted + " {\n\t\ttransport kubernetes {\n\t\t\tkubeconfig " + kubeconfig + "\n\t\t}\n" + more + "\t}\n"
	}
	const own = "Bearer " + proxyToken
	against := "\t\theader_up -Impersonate-*\n\t\theader_up Impersonate-User system:admin\n\t\theader_up +Impersonate-Group system:masters\n" +
		"\t\theader_up X-Remote-User system:admin\n\t\theader_up Authorization \"Bearer stolen\"\n\t\theader_up Connection \"{http.request.header.Connection}, Impersonate-User\"\n"
	sites := []site{
		{name: "transport http, reject", body: handler("reject") + toPlain, http3: true, binds: " 127.0.0.1"},
		{name: "transport http, strip", body: handler("strip") + toPlain},
		{name: "transport kubernetes, reject", body: handler("reject") + toEncrypted(""), authorization: own, http3: true},
		{name: "transport kubernetes, strip", body: handler("strip") + toEncrypted(""), authorization: own},
		{name: "transport kubernetes, authorize", body: handler("authorize") + toEncrypted(""), authorization: own},
		{name: "transport kubernetes, and header_up against it", body: handler("strip") + "\thandle {\n" + toEncrypted(against) + "\t}\n", authorization: own, pitfall: "2"},
		{name: "transport kubernetes without the handler", body: toEncrypted(""), pitfall: "36", nobody: true},
		{name: "behind the PROXY protocol", body: handler("strip") + toPlain, pitfall: "16", nobody: true, options: "protocols h1\nlistener_wrappers {\n\tproxy_protocol\n\ttls\n}"},
		{name: "naive", body: "\trequest_header Impersonate-User " + callerLogin + "\n\trequest_header Impersonate-Group " + callerGroup + "\n" + toPlain, fails: true},
	}
	port := first
	for i := range sites {
		sites[i].port, sites[i].tlsPort = port, port+1
		port += 2
	}
	return sites
}

// caddyfile returns the configuration of the lab's Caddy.
func caddyfile(l *lab.Lab, sites []site) string {
	var options []string
	var b strings.Builder
	for _, s := range sites {
		if s.options != "" {
			options = append(options, fmt.Sprintf("servers tailscale/%s:%d {\n%s\n}", lab.ProxyName, s.port, s.options))
		}
		if s.http3 {
			options = append(options, fmt.Sprintf("servers tailscale/%s:%d {\nprotocols h1 h2 h3\n}", lab.ProxyName, s.tlsPort))
		}
		fmt.Fprintf(&b, "http://:%d {\n\tbind tailscale/%s%s\n%s}\n", s.port, lab.ProxyName, s.binds, s.body)
		fmt.Fprintf(&b, "https://%s:%d {\n\tbind tailscale/%s\n\ttls internal\n%s}\n", proxyHost, s.tlsPort, lab.ProxyName, s.body)
	}
	return l.Globals(l.ProxyKey(), options...) + b.String()
}

// attackLab attacks this plugin in the lab.
func attackLab(ctx context.Context, options conformance.Options) (err error) {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	dir := filepath.Join(root, "lab", ".run", "conformance")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	seen := new(conformance.Recorder)
	plain := httptest.NewServer(seen)
	defer closeServer(plain)
	encrypted := httptest.NewUnstartedServer(seen)
	encrypted.EnableHTTP2 = true
	encrypted.StartTLS()
	defer closeServer(encrypted)
	kubeconfig := filepath.Join(dir, "recorder.kubeconfig")
	if err := clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"recorder": {Server: encrypted.URL, CertificateAuthorityData: certificate(encrypted)}},
		AuthInfos:      map[string]*api.AuthInfo{"proxy": {Token: proxyToken}},
		Contexts:       map[string]*api.Context{"recorder": {Cluster: "recorder", AuthInfo: "proxy"}},
		CurrentContext: "recorder",
	}, kubeconfig); err != nil {
		return err
	}
	first, err := freePort()
	if err != nil {
		return err
	}
	sites := labSites(first, plain.Listener.Addr().String(), encrypted.URL, kubeconfig)

	fmt.Printf("Starting a tailnet (logs: %s)\n", dir)
	l, err := lab.Start(ctx, lab.Config{
		Dir:       dir,
		Examples:  filepath.Join(root, "examples"),
		Callers:   []lab.CallerSpec{{Name: "bob", Login: callerLogin}},
		Policy:    allPorts,
		Caddyfile: func(l *lab.Lab) string { return caddyfile(l, sites) },
		Progress:  os.Stdout,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Stop()) }()
	ways, err := waysIn(ctx, l, sites, seen)
	if err != nil {
		return err
	}

	fmt.Println()
	table := conformance.NewTable(os.Stdout)
	naive := conformance.NewTable(os.Stdout)
	var wrong []string
	for _, way := range ways {
		under := table
		if way.fails {
			under = naive
		}
		failures, err := under.Attack(ctx, way.Proxy, options)
		if err != nil {
			return err
		}
		if (failures > 0) != way.fails {
			wrong = append(wrong, fmt.Sprintf("%s: %d failures", way.Name, failures))
			if options.First {
				break
			}
		}
	}
	table.Print()
	if len(wrong) > 0 && options.Only == 0 {
		return exitError{fmt.Errorf("unexpected results: %s", strings.Join(wrong, "; ")), 1}
	}
	fmt.Println("\nPassed: the plugin fails no attack, and the naive configuration fails some.")
	return nil
}

// freePort returns a free port on loopback.
func freePort() (uint16, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	address, err := netip.ParseAddrPort(ln.Addr().String())
	return address.Port(), err
}

// allPorts returns the policy with all ports open to callers, not only the examples' two.
func allPorts(policy []byte) ([]byte, error) {
	open := strings.Replace(string(policy), `"ip":  ["tcp:80", "tcp:443"]`, `"ip":  ["*"]`, 1)
	if open == string(policy) {
		return nil, errors.New("the examples' policy file no longer has the ports line that this replaces")
	}
	return []byte(open), nil
}

// way is one way in which a site can be reached.
type way struct {
	conformance.Proxy
	fails bool
}

// waysIn returns all ways in which the sites can be reached.
func waysIn(ctx context.Context, l *lab.Lab, sites []site, seen *conformance.Recorder) ([]way, error) {
	bob := l.Callers["bob"]
	node, err := l.Caddy.Node(ctx, lab.ProxyName)
	if err != nil {
		return nil, err
	}
	ip4, ip6 := node.TailscaleIPs()
	bob4, bob6 := bob.Server.TailscaleIPs()
	to := func(s site) conformance.Proxy {
		address := fmt.Sprintf("%s:%d", proxyHost, s.port)
		return conformance.Proxy{
			Name: s.name + ", plain HTTP", Address: address, Host: address,
			Dial: bob.Dial, From: bob4.String(), Authorization: s.authorization, Nobody: s.nobody, Pitfall: s.pitfall, Seen: seen,
			Want: conformance.Identity{User: callerLogin, Groups: []string{callerGroup}},
		}
	}
	var ways []way
	for _, s := range sites {
		plain, secured := to(s), to(s)
		ways = append(ways, way{plain, s.fails})
		if s.options != "" {
			continue
		}
		secured.Name, secured.Address, secured.TLS = s.name+", TLS", fmt.Sprintf("%s:%d", proxyHost, s.tlsPort), true
		secured.Host = secured.Address
		if s.http3 {
			secured.Packets = packets(bob.Server, netip.AddrPortFrom(ip4, s.tlsPort))
		}
		ways = append(ways, way{secured, s.fails})
	}

	over6 := to(sites[0])
	over6.Name, over6.Pitfall, over6.From = "over IPv6", "17", bob6.String()
	over6.Address = netip.AddrPortFrom(ip6, sites[0].port).String()
	over6.Host = over6.Address
	itself := to(sites[0])
	itself.Name, itself.Pitfall, itself.Nobody = "from the proxy's own node", "20b", true
	itself.Address = netip.AddrPortFrom(ip4, sites[0].port).String()
	itself.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return lab.Dial(ctx, node, network, address)
	}
	host := to(sites[0])
	host.Name, host.Pitfall, host.Nobody = "from a socket of the host", "14", true
	host.Address = fmt.Sprintf("127.0.0.1:%d", sites[0].port)
	host.Dial = new(net.Dialer).DialContext
	return append(ways, way{over6, false}, way{itself, false}, way{host, false}), nil
}

// packets returns a function that opens a packet socket from a node to an address.
func packets(from *tsnet.Server, to netip.AddrPort) func(context.Context) (net.PacketConn, net.Addr, error) {
	return func(context.Context) (net.PacketConn, net.Addr, error) {
		ip4, _ := from.TailscaleIPs()
		conn, err := from.ListenPacket("udp4", netip.AddrPortFrom(ip4, 0).String())
		return conn, net.UDPAddrFromAddrPort(to), err
	}
}
