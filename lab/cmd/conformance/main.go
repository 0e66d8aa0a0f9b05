// SPDX-License-Identifier: Apache-2.0

// Command conformance attacks proxies that impersonate their callers, and prints
// what came of it. Without flags it brings up the lab and attacks this plugin, with
// either transport, and a naive configuration that has to fail.
//
// With -address it attacks another proxy, from this machine, which has to be a
// device that the proxy lets through. Configure the proxy to use the address of
// -listen as its API server:
//
//	conformance -address k8s.example.ts.net:443 -tls -user alice@example.com -groups tailnet-readers -listen 0.0.0.0:6443
package main

import (
	"context"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/conformance"
)

func main() {
	var other conformance.Proxy
	flag.StringVar(&other.Address, "address", "", "host:port of the proxy to attack (default: the lab's)")
	flag.StringVar(&other.Host, "host", "", "name to call it by (default: its address)")
	flag.BoolVar(&other.TLS, "tls", false, "speak TLS to it, and HTTP/2 as well")
	flag.StringVar(&other.Want.User, "user", "", "the user that this machine is to it")
	groups := flag.String("groups", "", "the groups that this machine is in, separated by commas")
	flag.StringVar(&other.Authorization, "authorization", "", "the Authorization header that is the proxy's own (default: none)")
	listen := flag.String("listen", "127.0.0.1:6443", "where to take the API server's place, over TLS")
	ca := flag.String("ca", "conformance-ca.pem", "file to write the certificate to that the proxy has to trust")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	var err error
	if other.Address != "" {
		if *groups != "" {
			other.Want.Groups = strings.Split(*groups, ",")
		}
		err = attackOther(ctx, other, *listen, *ca)
	} else {
		err = attackLab(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// attackOther attacks a proxy that somebody else has set up.
func attackOther(ctx context.Context, p conformance.Proxy, listen, ca string) error {
	p.Name = p.Address
	if p.Host == "" {
		p.Host = p.Address
	}
	p.Dial = new(net.Dialer).DialContext
	p.Seen = new(conformance.Recorder)
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	server := httptest.NewUnstartedServer(p.Seen)
	server.Listener = ln
	server.EnableHTTP2 = true
	server.StartTLS()
	defer closeServer(server)
	if err := os.WriteFile(ca, certificate(server), 0o600); err != nil {
		return err
	}
	fmt.Printf("Taking the API server's place at %s, with the certificate in %s\n", server.URL, ca)
	failures, err := attack(ctx, p)
	if err == nil && failures > 0 {
		err = fmt.Errorf("%d requests arrived with something else than the identity of this machine", failures)
	}
	return err
}

// attackLab attacks this plugin in the lab.
func attackLab(ctx context.Context) (err error) {
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
	const token = "the-proxys-own"
	if err := clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"recorder": {Server: encrypted.URL, CertificateAuthorityData: certificate(encrypted)}},
		AuthInfos:      map[string]*api.AuthInfo{"proxy": {Token: token}},
		Contexts:       map[string]*api.Context{"recorder": {Cluster: "recorder", AuthInfo: "proxy"}},
		CurrentContext: "recorder",
	}, kubeconfig); err != nil {
		return err
	}

	const name, user, group = lab.ProxyName + "." + lab.Domain, "bob@example.com", "tailnet-readers"
	handler := func(mode string) string {
		return "\ttailscale_impersonate {\n\t\tclient_impersonation " + mode + "\n\t}\n"
	}
	toPlain := "\treverse_proxy " + plain.Listener.Addr().String() + "\n"
	toEncrypted := "\treverse_proxy " + encrypted.URL + " {\n\t\ttransport kubernetes {\n\t\t\tkubeconfig " + kubeconfig + "\n\t\t}\n\t}\n"
	naive := "\trequest_header Impersonate-User " + user + "\n\trequest_header Impersonate-Group " + group + "\n"
	sites := []struct {
		name, body, authorization string
		fails                     bool
	}{
		{"transport http, reject", handler("reject") + toPlain, "", false},
		{"transport http, strip", handler("strip") + toPlain, "", false},
		{"transport kubernetes, reject", handler("reject") + toEncrypted, "Bearer " + token, false},
		{"transport kubernetes, strip", handler("strip") + toEncrypted, "Bearer " + token, false},
		{"transport kubernetes, authorize", handler("authorize") + toEncrypted, "Bearer " + token, false},
		{"naive", naive + toPlain, "", true},
	}

	fmt.Printf("Bringing up a tailnet (logs: %s)\n", dir)
	l, err := lab.Start(ctx, lab.Config{
		Dir:      dir,
		Examples: filepath.Join(root, "examples"),
		Callers:  []lab.CallerSpec{{Name: "bob", Login: user}},
		Policy: func(policy []byte) ([]byte, error) {
			open := strings.Replace(string(policy), `"ip":  ["tcp:80", "tcp:443"]`, `"ip":  ["*"]`, 1)
			if open == string(policy) {
				return nil, errors.New("the policy file of the examples no longer names the ports that this replaces")
			}
			return []byte(open), nil
		},
		Caddyfile: func(l *lab.Lab) string {
			config := l.Globals(l.ProxyKey())
			for i, s := range sites {
				config += fmt.Sprintf("http://:%d {\n\tbind tailscale/%s\n%s}\n", 8000+i, lab.ProxyName, s.body)
				config += fmt.Sprintf("https://%s:%d {\n\tbind tailscale/%s\n\ttls internal\n%s}\n", name, 8400+i, lab.ProxyName, s.body)
			}
			return config
		},
		Progress: os.Stdout,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Stop()) }()

	bob := l.Callers["bob"]
	from, _ := bob.Server.TailscaleIPs()
	var wrong []string
	for i, s := range sites {
		for _, secured := range []bool{false, true} {
			p := conformance.Proxy{
				Name: s.name + ", plain HTTP", Address: fmt.Sprintf("%s:%d", name, 8000+i),
				Dial: bob.Dial, From: from.String(), Authorization: s.authorization, Seen: seen,
				Want: conformance.Identity{User: user, Groups: []string{group}},
			}
			if secured {
				p.Name, p.Address, p.TLS = s.name+", TLS", fmt.Sprintf("%s:%d", name, 8400+i), true
			}
			p.Host = p.Address
			failures, err := attack(ctx, p)
			if err != nil {
				return err
			}
			if (failures > 0) != s.fails {
				wrong = append(wrong, fmt.Sprintf("%s: %d failures", p.Name, failures))
			}
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("not as it has to be: %s", strings.Join(wrong, "; "))
	}
	fmt.Println("\nAll as it has to be: the plugin fails nowhere, the naive configuration does.")
	return nil
}

// attack attacks a proxy, prints the table, and returns the number of failures.
func attack(ctx context.Context, p conformance.Proxy) (failures int, err error) {
	results, err := conformance.Run(ctx, p)
	if err != nil {
		return 0, err
	}
	fmt.Printf("\n%s\n\n  %-50s %-9s %6s %8s %8s %7s\n", p.Name, "pitfall", "protocol", "tried", "exact", "nothing", "failed")
	var first *conformance.Failure
	for _, r := range results {
		fmt.Printf("  %-50s %-9s %6d %8d %8d %7d\n", r.Pitfall, r.Protocol, r.Tried, r.Passed, r.Ended, len(r.Failures))
		failures += len(r.Failures)
		if first == nil && len(r.Failures) > 0 {
			first = &r.Failures[0]
		}
	}
	if first != nil {
		fmt.Printf("\n  first failure (%s, %s): %s\n  request: %s\n", first.Pitfall, first.Protocol, first.Reason, first.Request)
	}
	return failures, nil
}

// certificate returns the certificate of a server, as PEM.
func certificate(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// closeServer closes a server at once: some of the requests never end.
func closeServer(s *httptest.Server) {
	s.CloseClientConnections()
	s.Close()
}
