// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go.uber.org/goleak"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/headscale"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
)

// Caddy answers on a tailnet node over HTTP/1.1, HTTP/2 and HTTP/3, keeps the node
// through reloads, and leaves nothing behind.
func TestCaddy_OnTailnet(t *testing.T) {
	// CertMagic watches a lock file for up to five seconds after it was removed.
	ended := goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh")
	current := goleak.IgnoreCurrent()
	defer func() { goleak.VerifyNone(t, current, ended) }()
	dir := tempdir.New(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	control, err := headscale.Start(ctx, headscale.Config{
		Dir: filepath.Join(dir, "headscale"),
		Policy: []byte(`{
			"tagOwners": {"tag:k8s": []},
			"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}],
		}`),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := control.Stop(); err != nil {
			t.Error(err)
		}
	}()
	if err := control.CreateUser(ctx, "alice@example.com"); err != nil {
		t.Fatal(err)
	}
	userKey, err := control.UserKey(ctx, "alice@example.com")
	if err != nil {
		t.Fatal(err)
	}
	nodeKey, err := control.TagKey(ctx, "tag:k8s")
	if err != nil {
		t.Fatal(err)
	}

	// load runs Caddy with a config whose answers name the generation.
	load := func(generation string) {
		t.Helper()
		config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt(fmt.Appendf(nil, `{
			admin off
			persist_config off
			skip_install_trust
			auto_https disable_redirects
			storage file_system %[1]s/caddy
			log {
				output file %[1]s/caddy.log {
					roll_disabled
				}
				level DEBUG
			}
			tailscale {
				auth_key {env.STANDIN_TEST_KEY}
				control_url %[2]s
				state_dir %[1]s/nodes
			}
		}
		http://:80, https://k8s.tailnet.example:443 {
			bind tailscale/k8s
			tls internal
			respond "%[3]s {http.request.proto}"
		}`, dir, control.URL(), generation), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := caddy.Load(config, true); err != nil {
			t.Fatalf("loading config %q: %v", generation, err)
		}
	}
	t.Setenv("STANDIN_TEST_KEY", nodeKey)
	load("first")
	defer func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
		for until := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if _, running := Node("k8s"); !running {
				break
			}
			if time.Now().After(until) {
				t.Fatal("Caddy has stopped, but its tailnet node still runs")
			}
		}
	}()

	node, ok := Node("k8s")
	if !ok {
		t.Fatal("Node(k8s) = false while Caddy listens on it")
	}
	status, err := node.Up(ctx)
	if err != nil {
		t.Fatal(err)
	}
	nodeIP := status.TailscaleIPs[0]

	client := &tsnet.Server{
		Dir: filepath.Join(dir, "client"), Hostname: "alice-laptop", AuthKey: userKey, ControlURL: control.URL(),
		UserLogf: func(string, ...any) {},
	}
	clientStatus, err := client.Up(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	// Each of these uses a new connection.
	const siteURL = "https://k8s.tailnet.example"
	overHTTP1 := func() (string, error) {
		return fetch(ctx, &http.Transport{DialContext: client.Dial, DisableKeepAlives: true}, "http://"+nodeIP.String())
	}
	dialNode := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return client.Dial(ctx, network, netip.AddrPortFrom(nodeIP, 443).String())
	}
	anyCert := &tls.Config{InsecureSkipVerify: true} // WireGuard authenticates the server
	overHTTP2 := func() (string, error) {
		rt := &http.Transport{DialContext: dialNode, TLSClientConfig: anyCert, ForceAttemptHTTP2: true}
		defer rt.CloseIdleConnections()
		return fetch(ctx, rt, siteURL)
	}
	overHTTP3 := func() (string, error) {
		socket, err := client.ListenPacket("udp4", netip.AddrPortFrom(clientStatus.TailscaleIPs[0], 0).String())
		if err != nil {
			return "", err
		}
		defer socket.Close()
		quicTransport := &quic.Transport{Conn: socket}
		defer quicTransport.Close()
		rt := &http3.Transport{
			TLSClientConfig: anyCert,
			Dial: func(ctx context.Context, _ string, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
				return quicTransport.DialEarly(ctx, net.UDPAddrFromAddrPort(netip.AddrPortFrom(nodeIP, 443)), tlsConf, conf)
			},
		}
		defer rt.Close()
		return fetch(ctx, rt, siteURL)
	}
	expect := func(get func() (string, error), want string) {
		t.Helper()
		got, err := get()
		if err != nil {
			t.Errorf("got error %v; want answer %q", err, want)
		} else if got != want {
			t.Errorf("got answer %q; want %q", got, want)
		}
	}

	expect(overHTTP1, "first HTTP/1.1")
	expect(overHTTP2, "first HTTP/2.0")
	expect(overHTTP3, "first HTTP/3.0")
	load("second")
	// An old handle accepts once more, as the real plugin's does: net/http then serves
	// HTTP/2, and closes HTTP/1.1 without an answer.
	expect(overHTTP2, "first HTTP/2.0")
	expect(overHTTP2, "second HTTP/2.0")
	if got, err := overHTTP1(); !errors.Is(err, io.EOF) {
		t.Errorf("got answer %q, error %v; want EOF from the replaced config", got, err)
	}
	expect(overHTTP1, "second HTTP/1.1")
	expect(overHTTP3, "second HTTP/3.0")

	if again, _ := Node("k8s"); again != node {
		t.Error("a reload replaced the node")
	}
}

// fetch sends a GET request and returns the body if the status is 200.
func fetch(ctx context.Context, rt http.RoundTripper, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s: %s", url, res.Status, body)
	}
	return string(body), nil
}

// Validating a config must not start its nodes.
func TestValidate_StartsNoNode(t *testing.T) {
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte("{\ntailscale {\nk8s {\n}\n}\n}\nhttp://:80 {\nbind tailscale/k8s\n}\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var config caddy.Config
	if err := json.Unmarshal(adapted, &config); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&config); err != nil {
		t.Fatal(err)
	}
	if _, ok := Node("k8s"); ok {
		t.Error("validating a config started its node")
	}
}
