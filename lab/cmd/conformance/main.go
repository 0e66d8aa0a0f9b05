// SPDX-License-Identifier: Apache-2.0

// Command conformance attacks proxies that impersonate their callers, and prints the
// results. Without -address it starts the lab and attacks this plugin, with both
// transports and in every way in which the lab can reach it, and a naive
// configuration that has to fail. The exit status is 1 if an attack succeeds, and 2
// if the attacks could not be made.
//
// With -address it attacks another proxy, from this machine, which has to be a
// device that the proxy accepts. Configure the proxy to use the address of -listen
// as its API server:
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

// exitError is an error with the exit status of the program.
type exitError struct {
	error
	status int
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		status := 2 // the attacks could not be made
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
	flag.StringVar(&other.Host, "host", "", "the proxy's host name (default: its address)")
	flag.BoolVar(&other.TLS, "tls", false, "use TLS, with HTTP/1.1 and HTTP/2")
	quic := flag.Bool("http3", false, "also try HTTP/3, which the proxy has to refuse")
	flag.StringVar(&other.Want.User, "user", "", "the user as which the proxy impersonates this machine")
	groups := flag.String("groups", "", "the groups of this machine, separated by commas")
	flag.StringVar(&other.Authorization, "authorization", "", "the proxy's own Authorization header (default: none)")
	listen := flag.String("listen", "127.0.0.1:6443", "address to listen on in place of the API server, over TLS")
	ca := flag.String("ca", "conformance-ca.pem", "file to write the certificate to, which the proxy has to trust")
	flag.IntVar(&options.Only, "attack", 0, "make only the attack with this number, as printed with a failure")
	flag.BoolVar(&options.First, "first", false, "stop at the first failure")
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
	other.Seen = new(conformance.Recorder)
	server, err := serve(other.Seen, *listen, *ca)
	if err != nil {
		return err
	}
	defer closeServer(server)
	return attackOther(ctx, other, options)
}

// serve starts a server in place of the API server and writes its certificate to the
// file ca.
func serve(seen *conformance.Recorder, listen, ca string) (*httptest.Server, error) {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, err
	}
	server := httptest.NewUnstartedServer(seen)
	server.Listener = ln
	server.EnableHTTP2 = true
	server.StartTLS()
	if err := os.WriteFile(ca, certificate(server), 0o600); err != nil {
		closeServer(server)
		return nil, err
	}
	fmt.Printf("Listening in place of the API server at %s, with the certificate in %s\n\n", server.URL, ca)
	return server, nil
}

// attackOther attacks a proxy outside of the lab.
func attackOther(ctx context.Context, p conformance.Proxy, options conformance.Options) error {
	p.Name = p.Address
	if p.Host == "" {
		p.Host = p.Address
	}
	p.Dial = new(net.Dialer).DialContext
	table := conformance.NewTable(os.Stdout)
	failures, err := table.Attack(ctx, p, options)
	if err != nil {
		return err
	}
	table.Print()
	if failures > 0 {
		return exitError{fmt.Errorf("%d attacks succeeded", failures), 1}
	}
	return nil
}

// certificate returns a server's certificate as PEM.
func certificate(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// closeServer closes a server at once: some of the requests never end.
func closeServer(s *httptest.Server) {
	s.CloseClientConnections()
	s.Close()
}
