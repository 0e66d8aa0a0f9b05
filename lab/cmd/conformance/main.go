// SPDX-License-Identifier: Apache-2.0

// Command conformance attacks proxies that impersonate their callers, and prints
// what came of it. Without -address it brings up the lab and attacks this plugin,
// with either transport and by every way in, and a naive configuration that has to
// fail. It ends with status 1 if any request fails, and with 2 if it could not try.
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
	"strings"
	"syscall"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/conformance"
)

// exitError is an error with the status that it ends the program with.
type exitError struct {
	error
	status int
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		status := 2 // nothing is shown
		var exit exitError
		if errors.As(err, &exit) {
			status = exit.status
		}
		os.Exit(status)
	}
}

func run() error {
	var other conformance.Proxy
	var options conformance.Options
	flag.StringVar(&other.Address, "address", "", "host:port of the proxy to attack (default: the lab's)")
	flag.StringVar(&other.Host, "host", "", "name to call it by (default: its address)")
	flag.BoolVar(&other.TLS, "tls", false, "speak TLS to it, and HTTP/2 as well")
	quic := flag.Bool("http3", false, "speak HTTP/3 to it as well, which it has to refuse")
	flag.StringVar(&other.Want.User, "user", "", "the user that this machine is to it")
	groups := flag.String("groups", "", "the groups that this machine is in, separated by commas")
	flag.StringVar(&other.Authorization, "authorization", "", "the Authorization header that is the proxy's own (default: none)")
	listen := flag.String("listen", "127.0.0.1:6443", "where to take the API server's place, over TLS")
	ca := flag.String("ca", "conformance-ca.pem", "file to write the certificate to that the proxy has to trust")
	flag.IntVar(&options.Only, "attack", 0, "make one attack only: the number that a failure is printed with")
	flag.BoolVar(&options.First, "first", false, "end at the first failure")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	if other.Address == "" {
		return attackLab(ctx, options)
	}
	if *groups != "" {
		other.Want.Groups = strings.Split(*groups, ",")
	}
	if *quic {
		other.Packets = func(context.Context) (net.PacketConn, net.Addr, error) {
			address, err := net.ResolveUDPAddr("udp", other.Address)
			if err != nil {
				return nil, nil, err
			}
			conn, err := net.ListenPacket("udp", ":0")
			return conn, address, err
		}
	}
	return attackOther(ctx, other, *listen, *ca, options)
}

// attackOther attacks a proxy that somebody else has set up.
func attackOther(ctx context.Context, p conformance.Proxy, listen, ca string, options conformance.Options) error {
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
	fmt.Printf("Taking the API server's place at %s, with the certificate in %s\n\n", server.URL, ca)
	table := conformance.NewTable(os.Stdout)
	failures, err := table.Attack(ctx, p, options)
	if err != nil {
		return err
	}
	table.Print()
	if failures > 0 {
		return exitError{fmt.Errorf("%d requests arrived with something else than the identity of this machine", failures), 1}
	}
	return nil
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
