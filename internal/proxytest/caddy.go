// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/intercept"

	// Where the Caddy that tests run keeps its files.
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// ToKubernetes is the smallest site that forwards requests to the API server.
const ToKubernetes = "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}"

// Config is a site to run.
type Config struct {
	// API is the API server that the variables of Global and Body stand for (see
	// [APIServer.Expand]). It may be nil.
	API *APIServer
	// Nodes are the tailnet nodes that the site's handlers ask, instead of those of the
	// listeners. If it is nil, they use those of the listeners.
	Nodes []*tailnet.Node
	// Body holds the directives of the site.
	Body string
	// Global stands before the site, for named routes.
	Global string
	// Server holds options of the server, in the syntax of the servers option.
	Server string
	// Bind holds the addresses to listen on, the tailnet node's if empty.
	Bind string
	// TLS says that the site speaks HTTPS.
	TLS bool
	// Log is a file for all that Caddy logs. If it is empty, the log is discarded.
	Log string
}

// Site is a site of a running Caddy.
type Site struct {
	Port uint16
	tls  *tls.Config // nil for plain HTTP
}

// lastPort is the last port of the tailnet node that a site has listened on.
var lastPort atomic.Uint32

// StartSite runs Caddy with a site of these directives, which listens on the tailnet
// alone, until the test is over.
func StartSite(t testing.TB, api *APIServer, body string, nodes ...*tailnet.Node) *Site {
	t.Helper()
	return Config{API: api, Body: body, Nodes: nodes}.Start(t)
}

// Start runs Caddy with the site until the test is over.
func (c Config) Start(t testing.TB) *Site {
	t.Helper()
	s := new(Site)
	if c.Bind == "" {
		c.Bind, s.Port = "tailnettest/k8s", uint16(20000+lastPort.Add(1))
	} else {
		s.Port = FreePort(t)
	}
	scheme, tlsLine := "http", ""
	if c.TLS {
		scheme = "https"
		var files string
		files, s.tls = certificate(t)
		tlsLine = "tls " + files
	}
	provide := ""
	if c.Nodes != nil {
		provide = "provide_nodes"
		nodesOfTest.Store((*tailnet.Nodes)(&c.Nodes))
	}
	if c.API != nil {
		c.Body = c.API.Expand(t, c.Body)
		c.Global = c.API.Expand(t, c.Global)
	}
	runCaddy(t, c, fmt.Sprintf(`
		%s
		%s://:%d {
			bind %s
			%s
			%s
			%s
		}`, c.Global, scheme, s.Port, c.Bind, tlsLine, provide, c.Body))
	return s
}

// runCaddy runs Caddy with the sites of a Caddyfile, and the options of c for servers and
// logs, until the test is over.
func runCaddy(t testing.TB, c Config, sites string) {
	t.Helper()
	serverOptions, output := c.Server, "discard"
	if c.Log != "" {
		output = "file " + c.Log
	}
	if !strings.Contains(serverOptions, "protocols ") {
		serverOptions += "\nprotocols h1 h2"
	}
	config := Adapt(t, fmt.Sprintf(`{
		admin off
		persist_config off
		auto_https off
		storage file_system %s
		servers {
			%s
		}
		log {
			output %s
		}
	}
	`, t.TempDir(), serverOptions, output)+sites)
	if err := caddy.Load(config, true); err != nil {
		t.Fatalf("running Caddy: %v", err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
}

// StopCaddy stops Caddy, and fails the test if that takes long.
func StopCaddy(t testing.TB) {
	t.Helper()
	stopped := make(chan error, 1)
	go func() { stopped <- caddy.Stop() }()
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Fatal("Caddy does not stop")
	}
}

// Adapt returns the JSON config of a Caddyfile.
func Adapt(t testing.TB, text string) []byte {
	t.Helper()
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, text)
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			t.Logf("Caddyfile:%d: %s", w.Line, w.Message)
		}
	}
	return config
}

// certificate returns the paths of a certificate and its key, separated by a blank,
// and what a client needs to trust it.
func certificate(t testing.TB) (files string, client *tls.Config) {
	t.Helper()
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	key, err := x509.MarshalPKCS8PrivateKey(srv.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	WriteFile(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	WriteFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	return certFile + " " + keyFile, &tls.Config{RootCAs: roots, ServerName: "example.com"}
}

// WriteFile writes a file that only its owner can read.
func WriteFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// FreePort returns a TCP port of the host that nothing listens on.
func FreePort(t testing.TB) uint16 {
	t.Helper()
	for range 100 {
		// Below the ports that the kernel gives to others, so that nothing takes it
		// before it is used.
		port := uint16(20000 + rand.IntN(12000))
		if ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = ln.Close()
			return port
		}
	}
	t.Fatal("none of 100 ports is free")
	return 0
}

// provideNodes is a handler that passes every request on. When its config starts, it
// gives the nodes of the test to all handlers of servers with a provideNodes that have a
// method UseNodes. They would otherwise take the nodes of the listeners, which do not run
// and could not say who a peer is.
type provideNodes struct{ ctx caddy.Context }

// nodesOfTest are the nodes that provideNodes gives away. Caddy runs one config at a
// time.
var nodesOfTest atomic.Pointer[tailnet.Nodes]

func init() {
	caddy.RegisterModule(new(provideNodes))
	httpcaddyfile.RegisterHandlerDirective("provide_nodes", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(provideNodes), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("provide_nodes", httpcaddyfile.Before, "tracing")
}

func (*provideNodes) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.provide_nodes", New: func() caddy.Module { return new(provideNodes) }}
}

func (p *provideNodes) Provision(ctx caddy.Context) error {
	p.ctx = ctx
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	return events.(*caddyevents.App).On("started", p)
}

func (p *provideNodes) Handle(context.Context, caddy.Event) error {
	app, err := p.ctx.AppIfConfigured("http")
	if err != nil {
		return err
	}
	for _, server := range app.(*caddyhttp.App).Servers {
		if len(HandlersOf[*provideNodes](server)) == 0 {
			continue
		}
		for _, h := range HandlersOf[interface{ UseNodes(tailnet.Nodes) }](server) {
			h.UseNodes(*nodesOfTest.Load())
		}
	}
	return nil
}

func (*provideNodes) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

// HandlersOf returns the handlers of type T in all routes of server.
func HandlersOf[T any](server *caddyhttp.Server) []T {
	var found []T
	var search func(caddyhttp.RouteList)
	search = func(routes caddyhttp.RouteList) {
		for _, route := range routes {
			for _, handler := range route.Handlers {
				switch handler := any(handler).(type) {
				case T:
					found = append(found, handler)
				case *caddyhttp.Subroute:
					search(handler.Routes)
				case *intercept.Intercept:
					for _, response := range handler.HandleResponse {
						search(response.Routes)
					}
				}
			}
		}
	}
	search(server.Routes)
	if server.Errors != nil {
		search(server.Errors.Routes)
	}
	for _, route := range server.NamedRoutes {
		search(caddyhttp.RouteList{*route})
	}
	return found
}
