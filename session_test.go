// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"tailscale.com/sessionrecording"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func TestSession_IsRecorded(t *testing.T) {
	up := proxytest.NewPods(t)
	for _, mode := range []recordertest.Mode{recordertest.V2, recordertest.V1} {
		for _, transport := range []string{"$KUBERNETES", "$HTTP"} {
			recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
			recorder.SetMode(mode)
			s := proxytest.Config{
				API:   up,
				TLS:   true,
				Body:  "tailscale_impersonate\nreverse_proxy https://$UPSTREAM {\n" + transport + "\n}",
				Nodes: []*tailnet.Node{node},
			}.Start(t)
			for name, open := range proxytest.Shells {
				t.Run(fmt.Sprintf("%s/%s/%d", name, transport, mode), func(t *testing.T) {
					since := proxytest.CountsSince(t, "recordings_total")
					sh := proxytest.MustOpen(t, open, s)
					sh.Hear(t, "hello ")
					sh.Say(t, "alice")
					sh.Hear(t, "hello alice")
					sh.Leave()
					proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
					got := proxytest.OneRecording(t, recorder)
					if got.Err() != nil {
						t.Errorf("the recording was cut off: %v", got.Err())
					}
					header, output := proxytest.ParseCast(t, got.Bytes())
					if output != "hello alice" {
						t.Errorf("recorded was %q", output)
					}
					want := sessionrecording.CastHeader{
						Version: 2, Width: 80, Height: 24, Timestamp: header.Timestamp, Command: "sh -c ls",
						SrcNode: "laptop.example.ts.net", SrcNodeID: "nLaptop", SrcNodeUser: "alice@example.com", SrcNodeUserID: 7,
						Env:        map[string]string{},
						Kubernetes: &sessionrecording.Kubernetes{PodName: "web", Namespace: "default", Container: "main", SessionType: "exec"},
					}
					if diff := cmp.Diff(want, header); diff != "" {
						t.Errorf("header (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

func TestSession_TaggedDeviceIsNamedByTags(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t)
	who := proxytest.WhoIs(proxytest.Readers, proxytest.SessionsEnforced)
	who.Node = &tailcfg.Node{Name: "ci.example.ts.net.", StableID: "nCI", User: 9, Tags: []string{"tag:ci"}}
	dial := node.DialPeer
	node = proxytest.NewNode(who, nil)
	node.DialPeer = dial
	s := proxytest.StartSite(t, proxytest.NewPods(t), proxytest.ToKubernetes, node)
	sh := proxytest.MustOpen(t, proxytest.OpenWebSocket, s)
	sh.Hear(t, "hello ")
	sh.Leave()
	header, _ := proxytest.ParseCast(t, proxytest.OneRecording(t, recorder).Bytes())
	if diff := cmp.Diff([]string{"tag:ci"}, header.SrcNodeTags); diff != "" || header.SrcNodeUser != "" || header.SrcNodeUserID != 0 {
		t.Errorf("got header %+v; want the tags and no user", header)
	}
}

// Over SPDY, the end of a connection alone means to kubectl that the command has succeeded.
func TestSession_ClientIsToldWhyAccessWasWithdrawn(t *testing.T) {
	up := proxytest.NewPods(t)
	for name, options := range map[string]string{"unrecorded": "", "recorded": "record " + t.TempDir()} {
		node := proxytest.NewChangingNode()
		s := proxytest.Config{
			API: up, TLS: true, Nodes: []*tailnet.Node{node.Node},
			Body: "tailscale_impersonate {\nrecheck_interval 1s\n" + options + "\n}\nreverse_proxy https://$UPSTREAM {\n$KUBERNETES\n}",
		}.Start(t)
		for protocol, open := range proxytest.Shells {
			t.Run(name+"/"+protocol, func(t *testing.T) {
				node.Says(proxytest.WhoIs(proxytest.Readers), nil)
				since := proxytest.CountsSince(t, "recordings_total")
				sh := proxytest.MustOpen(t, open, s)
				sh.Say(t, "alice")
				sh.Hear(t, "hello alice")
				node.Says(proxytest.WhoIs(), nil)
				shown, status := sh.End(t)
				const why = "access was withdrawn: alice@example.com is no longer in group tailnet-readers"
				// OpenSPDY and ExecTarget have a terminal.
				if !strings.Contains(shown, why) {
					t.Errorf("shown was %q; want the reason", shown)
				}
				if !strings.Contains(status, why) || !strings.Contains(status, `"Failure"`) {
					t.Errorf("the status is %s; want a failure with the reason", status)
				}
				if name == "recorded" {
					proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
				}
			})
		}
	}
}

// What a client sends right after its request, without waiting for the answer, is
// recorded as well.
func TestSession_BytesBeforeSwitchAreRecorded(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
	s := proxytest.StartSite(t, proxytest.NewPods(t), proxytest.ToKubernetes, node)
	request := proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)
	early := string(proxytest.ClientMessage("\x04"+`{"Width":132,"Height":43}`)) + string(proxytest.ClientMessage("\x00early")) + string(proxytest.ClientMessage("\x00 bird")[:3])
	sh, resp := proxytest.DialWebSocket(t, s, request+early)
	if sh == nil {
		t.Fatalf("got status %d", resp.StatusCode)
	}
	sh.Send(t, proxytest.ClientMessage("\x00 bird")[3:])
	sh.Hear(t, "hello early bird")
	sh.Leave()
	header, output := proxytest.ParseCast(t, proxytest.OneRecording(t, recorder).Bytes())
	if header.Width != 132 || header.Height != 43 || output != "hello early bird" {
		t.Errorf("recorded was %q on %dx%d", output, header.Width, header.Height)
	}

	// What cannot be parsed does not reach the pod.
	sh, resp = proxytest.DialWebSocket(t, s, request+string(proxytest.ClientMessage("\x09unknown"))+string(proxytest.ClientMessage("\x00too late")))
	if sh == nil {
		t.Fatalf("got status %d", resp.StatusCode)
	}
	if shown, status := sh.End(t); strings.Contains(shown, "too late") || !strings.Contains(status, "unknown channel 9") {
		t.Errorf("shown was %q, with status %s", shown, status)
	}
}

// Whatever a client does with paths, headers and protocols, a session that has to be
// recorded is recorded or refused.
func TestSession_ClientCannotSwitchRecordingOff(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
	up := proxytest.NewPods(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
	const pod = "/api/v1/namespaces/default/pods/web"

	for name, raw := range map[string]string{
		// Spellings that the API server accepts.
		"as it is":            proxytest.UpgradeRequest("GET", pod+"/exec?command=sh", "websocket", proxytest.WebSocketV5),
		"POST":                proxytest.UpgradeRequest("POST", pod+"/exec?command=sh", "websocket", proxytest.WebSocketV5),
		"attach":              proxytest.UpgradeRequest("GET", pod+"/attach", "websocket", proxytest.WebSocketV5),
		"percent-encoded":     proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/web/%65xec", "websocket", proxytest.WebSocketV5),
		"all percent-encoded": proxytest.UpgradeRequest("GET", "/%61pi/v1/n%61mespaces/default/p%6fds/w%65b/e%78ec", "websocket", proxytest.WebSocketV5),
		"trailing slash":      proxytest.UpgradeRequest("GET", pod+"/exec/", "websocket", proxytest.WebSocketV5),
		"trailing slashes":    proxytest.UpgradeRequest("GET", pod+"/exec///", "websocket", proxytest.WebSocketV5),
		"more behind it":      proxytest.UpgradeRequest("GET", pod+"/exec/more", "websocket", proxytest.WebSocketV5),
		"watch":               proxytest.UpgradeRequest("GET", pod+"/exec?watch=true&command=sh", "websocket", proxytest.WebSocketV5),
		"dry run":             proxytest.UpgradeRequest("GET", pod+"/exec?dryRun=All&record=false&recorder=none", "websocket", proxytest.WebSocketV5),
		"upgrade in capitals": proxytest.UpgradeRequest("GET", pod+"/exec", "WEBSOCKET", proxytest.WebSocketV5),
		"headers":             proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", proxytest.WebSocketV5, "X-Recording: off", "Audit-Id: x", "X-Forwarded-Uri: /healthz", "X-Original-Url: /healthz", "X-Http-Method-Override: PUT"),
		"extensions":          proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", proxytest.WebSocketV5, "Sec-WebSocket-Extensions: permessage-deflate", "Sec_WebSocket_Extensions: permessage-deflate"),
		"Connection":          strings.Replace(proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", proxytest.WebSocketV5), "Connection: Upgrade", "Connection: keep-alive, X-Recording\r\nconnection: uPgRaDe", 1),
		"older watch":         proxytest.UpgradeRequest("GET", "/api/v1/watch/namespaces/default/pods/web/exec", "websocket", proxytest.WebSocketV5),
		"absolute URL":        proxytest.UpgradeRequest("GET", "http://k8s"+pod+"/exec", "websocket", proxytest.WebSocketV5),
	} {
		t.Run("recorded/"+name, func(t *testing.T) {
			since := proxytest.CountsSince(t, "recordings_total")
			sh, resp := proxytest.DialWebSocket(t, s, raw)
			if sh == nil {
				body, _ := io.ReadAll(resp.Body)
				t.Fatalf("got status %d: %s", resp.StatusCode, body)
			}
			sh.Hear(t, "hello ")
			sh.Leave()
			proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
			if _, output := proxytest.ParseCast(t, proxytest.OneRecording(t, recorder).Bytes()); output != "hello " {
				t.Errorf("recorded was %q", output)
			}
			if got := up.One(t).Header["Sec-Websocket-Extensions"]; len(got) > 0 {
				t.Errorf("the API server is offered the extensions %q", got)
			}
		})
	}

	for name, raw := range map[string]string{
		// Spellings that have several readings.
		"encoded slash":               proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/web%2Fexec", "websocket", proxytest.WebSocketV5),
		"encoded slash, lower case":   proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/web%2fexec", "websocket", proxytest.WebSocketV5),
		"double slash":                proxytest.UpgradeRequest("GET", "//api/v1/namespaces/default/pods/web/exec", "websocket", proxytest.WebSocketV5),
		"double slash inside":         proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods//web/exec", "websocket", proxytest.WebSocketV5),
		"dot":                         proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/./web/exec", "websocket", proxytest.WebSocketV5),
		"dots":                        proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/web/log/../exec", "websocket", proxytest.WebSocketV5),
		"encoded dots":                proxytest.UpgradeRequest("GET", "/api/v1/namespaces/default/pods/web/log/%2e%2e/exec", "websocket", proxytest.WebSocketV5),
		"without upgrading, odd path": "GET /api/v1//namespaces HTTP/1.1\r\nHost: k8s\r\n\r\n",
		// Other ways to a shell.
		"node proxy":             proxytest.UpgradeRequest("GET", "/api/v1/nodes/n/proxy/exec/default/web/main?command=sh", "websocket", proxytest.WebSocketV5),
		"node proxy, POST":       "POST /api/v1/nodes/n/proxy/run/default/web/main?cmd=id HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
		"node proxy, encoded":    proxytest.UpgradeRequest("GET", "/api/v1/nodes/n/%70roxy/exec%2Fdefault/../web", "websocket", proxytest.WebSocketV5),
		"pod proxy":              "GET " + pod + "/proxy/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"service proxy":          "GET /api/v1/namespaces/default/services/s/proxy/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"older proxy":            "GET /api/v1/proxy/nodes/n/run HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"console of an addition": proxytest.UpgradeRequest("GET", "/apis/subresources.kubevirt.io/v1/namespaces/default/virtualmachineinstances/vm/console", "websocket", proxytest.WebSocketV5),
		"exec of an addition":    proxytest.UpgradeRequest("GET", "/apis/example.com/v1/namespaces/default/pods/web/exec", "websocket", proxytest.WebSocketV5),
		"exec in capitals":       proxytest.UpgradeRequest("GET", pod+"/EXEC", "websocket", proxytest.WebSocketV5),
		"not of the API":         proxytest.UpgradeRequest("GET", "/shell", "websocket", proxytest.WebSocketV5),
		"under a prefix":         proxytest.UpgradeRequest("GET", "/k8s"+pod+"/exec", "websocket", proxytest.WebSocketV5),
		// Protocols that cannot be recorded.
		"no upgrade":                       "POST " + pod + "/exec?command=sh HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
		"Upgrade without Connection":       "GET " + pod + "/exec HTTP/1.1\r\nHost: k8s\r\nUpgrade: websocket\r\n" + proxytest.WebSocketV5 + "\r\n\r\n",
		"another upgrade":                  proxytest.UpgradeRequest("GET", pod+"/exec", "h2c"),
		"two upgrades":                     proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", "Upgrade: SPDY/3.1", proxytest.WebSocketV5),
		"two upgrades in one":              proxytest.UpgradeRequest("GET", pod+"/exec", "websocket, SPDY/3.1", proxytest.WebSocketV5),
		"another SPDY":                     proxytest.UpgradeRequest("POST", pod+"/exec", "SPDY/3", proxytest.SPDYV4),
		"WebSocket without a subprotocol":  proxytest.UpgradeRequest("GET", pod+"/exec", "websocket"),
		"an unknown subprotocol":           proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", "Sec-WebSocket-Protocol: v9.channel.k8s.io"),
		"an unknown subprotocol behind v5": proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", proxytest.WebSocketV5, "Sec-WebSocket-Protocol: v9.channel.k8s.io"),
		"a tunnel":                         proxytest.UpgradeRequest("GET", pod+"/exec", "websocket", "Sec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io"),
		"an unknown version of SPDY's":     proxytest.UpgradeRequest("POST", pod+"/exec", "SPDY/3.1", proxytest.SPDYV4+", v9.channel.k8s.io"),
	} {
		t.Run("refused/"+name, func(t *testing.T) {
			since := proxytest.CountsSince(t, "recordings_total")
			resp := s.HTTP1(t, proxytest.AliceAddr, raw)
			var status metav1.Status
			if err := json.NewDecoder(resp.Body).Decode(&status); err != nil || status.Kind != "Status" || !strings.HasPrefix(status.Message, "tailscale_impersonate: ") {
				t.Errorf("got status %d: %+v, %v", resp.StatusCode, status, err)
			}
			if resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusForbidden {
				t.Errorf("got status %d", resp.StatusCode)
			}
			up.CheckNone(t)
			proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total refused": 1})
			if n := len(recorder.Take()); n != 0 {
				t.Errorf("the recorder was given %d recordings", n)
			}
		})
	}

	// Other requests are not affected.
	for name, raw := range map[string]string{
		"list":                 "GET /api/v1/namespaces/default/pods/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"log":                  "GET " + pod + "/log?follow=true HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"watch":                proxytest.UpgradeRequest("GET", "/api/v1/pods?watch=true", "websocket"),
		"log over a WebSocket": proxytest.UpgradeRequest("GET", pod+"/log?follow=true", "websocket", "Sec-WebSocket-Protocol: binary.k8s.io"),
		"version":              "GET /version HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"ephemeral container":  "PATCH " + pod + "/ephemeralcontainers HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run("no session/"+name, func(t *testing.T) {
			since := proxytest.CountsSince(t, "recordings_total")
			resp := s.HTTP1(t, proxytest.AliceAddr, raw)
			if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusSwitchingProtocols {
				body, _ := io.ReadAll(resp.Body)
				t.Errorf("got status %d: %s", resp.StatusCode, body)
			}
			up.CheckOne(t, proxytest.AliceAsProxy)
			proxytest.WaitForCounts(t, since, map[string]float64{})
		})
	}
}

// A decision about one path does not hold for another.
func TestSession_RewrittenPathIsRefused(t *testing.T) {
	for name, tt := range map[string]struct{ rule, body, path string }{
		"enforced":    {proxytest.SessionsEnforced, "uri strip_prefix /k8s\n", "/k8s/api/v1/namespaces/default/pods/web/exec"},
		"wanted":      {proxytest.SessionsWanted, "uri strip_prefix /k8s\n", "/k8s/api/v1/namespaces/default/pods/web/exec"},
		"another pod": {proxytest.SessionsWanted, "uri replace web secret\n", "/api/v1/namespaces/default/pods/web/exec"},
		"no session":  {proxytest.SessionsWanted, "uri replace log exec\n", "/api/v1/namespaces/default/pods/web/log"},
	} {
		t.Run(name, func(t *testing.T) {
			up := proxytest.NewPods(t)
			_, node := proxytest.StartRecorder(t, tt.rule)
			s := proxytest.StartSite(t, up, "route {\ntailscale_impersonate\n"+tt.body+"reverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
			if resp := s.HTTP1(t, proxytest.AliceAddr, proxytest.UpgradeRequest("GET", tt.path, "websocket", proxytest.WebSocketV5)); resp.StatusCode != http.StatusForbidden {
				t.Errorf("got status %d; want 403", resp.StatusCode)
			}
			up.CheckNone(t)
		})
	}
}

// All the ways in which a recorder can fail, for callers that have to be recorded and for
// those that need not be.
func TestSession_FailingRecorder(t *testing.T) {
	addrs := func(addresses ...string) string {
		b, err := json.Marshal(addresses)
		if err != nil {
			t.Fatal(err)
		}
		return `{"recorderAddrs":` + string(b)
	}
	up := proxytest.NewPods(t)
	for _, tt := range []struct {
		name  string
		rule  string // without enforceRecorder
		mode  recordertest.Mode
		works bool
	}{
		{"refuses connections", addrs(proxytest.AbsentAddr), recordertest.V2, false},
		{"does not answer", addrs(proxytest.EmptyAddr), recordertest.V2, false},
		{"accepts and is silent", addrs(proxytest.RecorderAddr), recordertest.Silent, false},
		{"answers with an error", addrs(proxytest.RecorderAddr), recordertest.Failing, false},
		{"is no peer's address", addrs("192.0.2.1:80"), recordertest.V2, false},
		{"is the proxy's own address", addrs(proxytest.NodeAddr + ":80"), recordertest.V2, false},
		{"is known by its tag only", `{"recorder":["tag:recorder"]`, recordertest.V2, false},
		{"others before and behind it fail", addrs(proxytest.EmptyAddr, proxytest.AbsentAddr, proxytest.RecorderAddr, proxytest.EmptyAddr, "192.0.2.1:80"), recordertest.V2, true},
		{"slow", addrs(proxytest.RecorderAddr), recordertest.Slow, true},
	} {
		for _, enforce := range []bool{true, false} {
			for name, open := range proxytest.Shells {
				t.Run(fmt.Sprintf("%s/enforced %t/%s", tt.name, enforce, name), func(t *testing.T) {
					recorder, node := proxytest.StartRecorder(t, fmt.Sprintf(`%s,"enforceRecorder":%t}`, tt.rule, enforce))
					recorder.SetMode(tt.mode)
					s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
					since := proxytest.CountsSince(t, "recordings_total")
					up.Take()
					began := time.Now()
					sh, resp := open(t, s, proxytest.ExecTarget)
					took := time.Since(began)
					if took > 6*time.Second {
						t.Errorf("it took %v", took)
					}
					if tt.works && took > 2*time.Second {
						t.Errorf("it took %v, with one recorder that answers", took)
					}
					if enforce && !tt.works {
						if sh != nil {
							t.Fatal("the session began")
						}
						proxytest.CheckRefused(t, resp, proxytest.Forbidden, "the session has to be recorded, and no recorder can be reached")
						up.CheckNone(t)
						proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total refused": 1})
						// kubectl tries again over the other protocol.
						began := time.Now()
						if sh, _ := open(t, s, proxytest.ExecTarget); sh != nil || time.Since(began) > time.Second {
							t.Errorf("the next try took %v", time.Since(began))
						}
						return
					}
					if sh == nil {
						t.Fatalf("got status %d", resp.StatusCode)
					}
					sh.Hear(t, "hello ")
					sh.Say(t, "alice")
					sh.Hear(t, "hello alice")
					sh.Leave()
					if !tt.works {
						proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total unrecorded": 1})
						return
					}
					proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
					if _, output := proxytest.ParseCast(t, proxytest.OneRecording(t, recorder).Bytes()); output != "hello alice" {
						t.Errorf("recorded was %q", output)
					}
				})
			}
		}
	}
}

// If a recorder dies or stalls during a session that has to be recorded, the session ends
// and its user is told why. Other sessions continue.
func TestSession_LostRecorder(t *testing.T) {
	up := proxytest.NewPods(t)
	for _, version := range []recordertest.Mode{recordertest.V1, recordertest.V2} {
		for _, way := range []string{"dies", "stalls"} {
			for _, enforce := range []bool{true, false} {
				for name, open := range proxytest.Shells {
					t.Run(fmt.Sprintf("%s/version %d/enforced %t/%s", way, version, enforce, name), func(t *testing.T) {
						recorder, node := proxytest.StartRecorder(t, fmt.Sprintf(`{"recorderAddrs":[%q],"enforceRecorder":%t}`, proxytest.RecorderAddr, enforce))
						recorder.SetMode(version)
						if way == "stalls" {
							if version == recordertest.V1 {
								t.Skip("the same as in version 2, where the bound is the sink's")
							}
							recorder.SetMode(recordertest.Stalling)
						}
						s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
						since := proxytest.CountsSince(t, "recordings_total")
						sh := proxytest.MustOpen(t, open, s)
						sh.Hear(t, "hello ")
						began := time.Now()
						var more sync.WaitGroup
						if way == "dies" {
							recorder.Cut()
						} else {
							more.Go(func() {
								// More than all buffers hold.
								block := strings.Repeat("x", 32<<10)
								for range 400 {
									if !sh.TrySay(block) {
										return
									}
								}
							})
						}
						if !enforce {
							if way == "dies" {
								sh.Say(t, "bob")
								sh.Hear(t, "hello bob")
							} else {
								sh.Skip(t, 400*32<<10)
							}
							more.Wait()
							sh.Leave()
							proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total lost": 1})
							return
						}
						shown, status := sh.End(t)
						if took := time.Since(began); took > 12*time.Second {
							t.Errorf("it ended after %v", took)
						}
						const reason = "The session was ended by the proxy: this session has to be recorded, and its recorder was lost"
						if !strings.HasSuffix(shown, "\r\n"+reason+"\r\n") {
							t.Errorf("on the terminal was %q at last", shown[max(0, len(shown)-200):])
						}
						var got metav1.Status
						if err := json.Unmarshal([]byte(status), &got); err != nil || got.Status != metav1.StatusFailure || got.Message != reason {
							t.Errorf("on the error stream was %s", status)
						}
						sh.Leave()
						more.Wait()
						proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
					})
				}
			}
		}
	}
}

// A session that has to end does not wait for a pod that neither reads nor writes.
func TestSession_LostRecorderEndsBusyPod(t *testing.T) {
	up := proxytest.NewTunnel(t, func(conn net.Conn) {
		defer conn.Close()
		_, _ = io.WriteString(conn, proxytest.SwitchedToV5+string(proxytest.PodMessage("\x01hello ")))
		<-t.Context().Done()
	})
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
	since := proxytest.CountsSince(t, "recordings_total")
	sh := proxytest.MustOpenWebSocket(t, s)
	sh.Hear(t, "hello ")
	sh.Stall()
	recorder.Cut()
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
}

// A session that has to end does not wait for a client that does not read.
func TestSession_ClientThatDoesNotReadIsEnded(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
	s := proxytest.StartSite(t, proxytest.NewPods(t), proxytest.ToKubernetes, node)
	since := proxytest.CountsSince(t, "recordings_total")
	sh := proxytest.MustOpenWebSocket(t, s)
	var typing sync.WaitGroup
	typing.Go(func() {
		for sh.TrySay(strings.Repeat("x", 32<<10)) {
		}
	})
	// The client does not read, so nothing is recorded any more once all buffers are full.
	recorded := func() int {
		total := 0
		for _, r := range recorder.Peek() {
			total += len(r.Bytes())
		}
		return total
	}
	for before := -1; recorded() != before; {
		before = recorded()
		time.Sleep(300 * time.Millisecond) // in which more would have arrived
	}
	recorder.Cut()
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
	sh.Leave()
	typing.Wait()
}

// When Caddy stops or reloads, it writes a close message to each WebSocket, and waits
// until that is written. A client that does not read must not hold it up.
func TestStop_ClientThatDoesNotReadIsNotWaitedFor(t *testing.T) {
	for _, rules := range [][]string{{}, {proxytest.SessionsEnforced}} {
		full := make(chan struct{})
		up := proxytest.NewTunnel(t, func(conn net.Conn) {
			defer conn.Close()
			_, err := io.WriteString(conn, proxytest.SwitchedToV5)
			for block := proxytest.PodMessage("\x01" + strings.Repeat("x", 1<<20)); err == nil; {
				_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
				_, err = conn.Write(block)
			}
			close(full)
			<-t.Context().Done()
		})
		_, node := proxytest.StartRecorder(t, rules...)
		proxytest.MustOpen(t, proxytest.OpenWebSocket, proxytest.StartSite(t, up, proxytest.ToKubernetes, node))
		<-full
		proxytest.StopCaddy(t)
	}
}

// Neither must a pod that does not read.
func TestStop_PodThatDoesNotReadIsNotWaitedFor(t *testing.T) {
	for _, rules := range [][]string{{}, {proxytest.SessionsEnforced}} {
		up := proxytest.NewTunnel(t, func(conn net.Conn) {
			defer conn.Close()
			if _, err := io.WriteString(conn, proxytest.SwitchedToV5); err != nil {
				t.Error(err)
			}
			<-t.Context().Done()
		})
		_, node := proxytest.StartRecorder(t, rules...)
		proxytest.MustOpenWebSocket(t, proxytest.StartSite(t, up, proxytest.ToKubernetes, node)).Stall()
		proxytest.StopCaddy(t)
	}
}

// Data on an unknown stream ends any session.
func TestSession_UnknownStreamEndsIt(t *testing.T) {
	for _, rule := range []string{proxytest.SessionsEnforced, proxytest.SessionsWanted} {
		recorder, node := proxytest.StartRecorder(t, rule)
		s := proxytest.StartSite(t, proxytest.NewPods(t), proxytest.ToKubernetes, node)
		sh := proxytest.MustOpenWebSocket(t, s)
		sh.Hear(t, "hello ")
		since := proxytest.CountsSince(t, "recordings_total")
		sh.Send(t, proxytest.ClientMessage("\x07x"))
		if shown, status := sh.End(t); !strings.Contains(shown, "unknown channel 7") || !strings.Contains(status, "unknown channel 7") {
			t.Errorf("shown was %q, with status %s", shown, status)
		}
		proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
		proxytest.OneRecording(t, recorder)
	}
}

// Recordings are also written to files, with or without a recorder.
func TestSession_FilesAreKept(t *testing.T) {
	up := proxytest.NewPods(t)
	for _, rules := range [][]string{nil, {proxytest.SessionsEnforced}} {
		dir := filepath.Join(t.TempDir(), "a", "b")
		recorder, node := proxytest.StartRecorder(t, rules...)
		s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
		since := proxytest.CountsSince(t, "recordings_total")
		sh := proxytest.MustOpen(t, proxytest.OpenSPDY, s)
		sh.Hear(t, "hello ")
		sh.Say(t, "alice")
		sh.Hear(t, "hello alice")

		// This would be left if the proxy were killed now.
		partial := onlyFile(t, dir, ".cast.partial")
		deadline := time.Now().Add(time.Second)
		for {
			b, err := os.ReadFile(partial)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(string(b), "\n") {
				if _, output := proxytest.ParseCast(t, b); output == "hello alice" {
					break
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("a second later, the file holds %q", b)
			}
			time.Sleep(10 * time.Millisecond) // between two looks
		}
		sh.Leave()
		proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
		file := onlyFile(t, dir, ".cast")
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("the file has mode %v", mode)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, output := proxytest.ParseCast(t, b); output != "hello alice" {
			t.Errorf("the file holds %q", output)
		}
		if len(rules) > 0 {
			if diff := cmp.Diff(string(b), string(proxytest.OneRecording(t, recorder).Bytes())); diff != "" {
				t.Errorf("the recorder has another recording (-file +recorder):\n%s", diff)
			}
		}
	}
}

// onlyFile returns the one file in dir, which has to end with suffix.
func onlyFile(t *testing.T, dir, suffix string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || !strings.HasSuffix(entries[0].Name(), suffix) {
		t.Fatalf("the directory holds %v; want one file ending with %s", entries, suffix)
	}
	return filepath.Join(dir, entries[0].Name())
}

func TestSession_UnwritableFileRefusesIt(t *testing.T) {
	up := proxytest.NewPods(t)
	notADir := filepath.Join(t.TempDir(), "file")
	proxytest.WriteFile(t, notADir, "")
	_, node := proxytest.StartRecorder(t)
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+notADir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	_, resp := proxytest.OpenWebSocket(t, s, proxytest.ExecTarget)
	proxytest.CheckRefused(t, resp, proxytest.Unavailable, "the session cannot be recorded")
	up.CheckNone(t)
}

// Local files do not satisfy enforceRecorder.
func TestSession_FileDoesNotSatisfyEnforcement(t *testing.T) {
	up := proxytest.NewPods(t)
	for _, rule := range []string{`{"recorderAddrs":["` + proxytest.AbsentAddr + `"]}`, `{"recorderAddrs":["` + proxytest.AbsentAddr + `"],"enforceRecorder":true}`} {
		dir := t.TempDir()
		_, node := proxytest.StartRecorder(t, rule)
		s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
		since := proxytest.CountsSince(t, "recordings_total")
		up.Take()
		sh, resp := proxytest.OpenWebSocket(t, s, proxytest.ExecTarget)
		if strings.Contains(rule, "enforce") {
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "no recorder can be reached")
			up.CheckNone(t)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("the directory holds %v, %v", entries, err)
			}
			continue
		}
		if sh == nil {
			t.Fatalf("got status %d", resp.StatusCode)
		}
		sh.Hear(t, "hello ")
		sh.Leave()
		proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total lost": 1})
		onlyFile(t, dir, ".cast")
	}
}

// A session that the API server refuses leaves no recording.
func TestSession_RefusedLeavesNoRecording(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) })
	dir := t.TempDir()
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	since := proxytest.CountsSince(t, "recordings_total")
	if resp := s.HTTP1(t, proxytest.AliceAddr, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got status %d", resp.StatusCode)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
	if b := proxytest.OneRecording(t, recorder).Bytes(); len(b) > 0 {
		t.Errorf("the recorder holds %q", b)
	}
	proxytest.WaitForCounts(t, since, map[string]float64{})
}

// A session may have run although the API server never answered, whatever the cause. The
// recording, which says what was asked for, is kept.
func TestSession_UnansweredIsKept(t *testing.T) {
	for _, tt := range []struct {
		name string
		// cause is what happens once the API server has the request.
		cause func(client, upstream net.Conn)
	}{
		{"the client goes away", func(client, _ net.Conn) { _ = client.Close() }},
		{"the API server goes away", func(_, upstream net.Conn) { _ = upstream.Close() }},
		{"the API server goes away in the middle of its answer", func(_, upstream net.Conn) {
			_, _ = io.WriteString(upstream, "HTTP/1.1 101 Switching")
			_ = upstream.Close()
		}},
		{"the access is withdrawn", func(net.Conn, net.Conn) {
			process := app.Acquire()
			defer process.Release()
			for _, c := range process.Requests.Clients() {
				process.Requests.Drop(c.Remote, c.Local, c.Identity.Node, "operator")
			}
		}},
	} {
		for transport, config := range map[string]string{"kubernetes": "$KUBERNETES", "http": "$HTTP"} {
			t.Run(tt.name+", transport "+transport, func(t *testing.T) {
				running := make(chan net.Conn, 1)
				up := proxytest.NewTunnel(t, func(conn net.Conn) { running <- conn })
				recorder, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
				dir := t.TempDir()
				s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n"+config+"\n}", node)
				since := proxytest.CountsSince(t, "recordings_total")
				client := s.Dial(t, proxytest.AliceAddr)
				if _, err := io.WriteString(client, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); err != nil {
					t.Fatal(err)
				}
				var upstream net.Conn
				select {
				case upstream = <-running:
				case <-time.After(10 * time.Second):
					t.Fatal("the API server is not asked")
				}
				defer upstream.Close()
				tt.cause(client, upstream)
				proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
				files, err := filepath.Glob(filepath.Join(dir, "*.cast"))
				if err != nil || len(files) != 1 {
					t.Fatalf("the directory holds %q, %v; want a recording", files, err)
				}
				kept, err := os.ReadFile(files[0])
				if err != nil {
					t.Fatal(err)
				}
				for who, b := range map[string][]byte{"the file": kept, "the recorder": proxytest.OneRecording(t, recorder).Bytes()} {
					if header, _ := proxytest.ParseCast(t, b); header.Command != "sh -c ls" {
						t.Errorf("%s holds %q; want what was asked for", who, b)
					}
				}
			})
		}
	}
}

// A session cannot have run if no API server could be reached.
func TestSession_UnsentLeavesNoRecording(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	dir := t.TempDir()
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", proxytest.AliceNode())
	up.Close()
	since := proxytest.CountsSince(t, "recordings_total")
	if resp := s.HTTP1(t, proxytest.AliceAddr, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("got status %d", resp.StatusCode)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
	proxytest.WaitForCounts(t, since, map[string]float64{})
}

// A client that goes away while its recorder is dialled does not make the recorder count
// as failed: the next session is recorded.
func TestSession_ClientGoingAwayKeepsRecordingOn(t *testing.T) {
	for _, rule := range []string{proxytest.SessionsEnforced, proxytest.SessionsWanted} {
		recorder, node := proxytest.StartRecorder(t, rule)
		dial := node.DialPeer
		asked := make(chan struct{}, 10)
		node.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		s := proxytest.StartSite(t, proxytest.NewPods(t), proxytest.ToKubernetes, node)
		since := proxytest.CountsSince(t, "recordings_total")
		conn := s.Dial(t, proxytest.AliceAddr)
		if _, err := io.WriteString(conn, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); err != nil {
			t.Fatal(err)
		}
		<-asked
		_ = conn.Close()
		outcome := "recordings_total unrecorded"
		if rule == proxytest.SessionsEnforced {
			outcome = "recordings_total refused"
		}
		proxytest.WaitForCounts(t, since, map[string]float64{outcome: 1})
		node.DialPeer = dial
		since = proxytest.CountsSince(t, "recordings_total")
		sh := proxytest.MustOpen(t, proxytest.OpenWebSocket, s)
		sh.Hear(t, "hello ")
		sh.Leave()
		proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
		proxytest.OneRecording(t, recorder)
	}
}

// The API server must choose a protocol that it was offered.
func TestSession_UnofferedProtocolIsNotSpoken(t *testing.T) {
	for name, chosen := range map[string]string{
		"another subprotocol": "Upgrade: websocket\r\nSec-WebSocket-Protocol: v9.channel.k8s.io\r\n",
		"no subprotocol":      "Upgrade: websocket\r\n",
		"compression":         "Upgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\nSec-WebSocket-Extensions: permessage-deflate\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			up := proxytest.NewTunnel(t, func(conn net.Conn) {
				defer conn.Close()
				_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+chosen+"\r\n"+string(proxytest.PodMessage("\x01secret")))
				_, _ = io.Copy(io.Discard, conn)
			})
			_, node := proxytest.StartRecorder(t, proxytest.SessionsEnforced)
			s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
			since := proxytest.CountsSince(t, "recordings_total")
			conn := s.Dial(t, proxytest.AliceAddr)
			if _, err := io.WriteString(conn, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); err != nil {
				t.Fatal(err)
			}
			proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if b, _ := io.ReadAll(conn); strings.Contains(string(b), "secret") {
				t.Errorf("the client has read %q", b)
			}
		})
	}
}

// 200 sessions at once; half of them lose their recorder.
func TestSession_ManyLeaveNothingBehind(t *testing.T) {
	const sessions = 200
	up := proxytest.NewPods(t)
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsWanted)
	dir := t.TempDir()
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	warm := proxytest.MustOpen(t, proxytest.OpenWebSocket, s)
	warm.Hear(t, "hello ")
	warm.Leave()
	proxytest.OneRecording(t, recorder)
	settle := func() {
		up.CloseClientConnections()
		runtime.GC()
	}
	settle()
	before := runtime.NumGoroutine()

	since := proxytest.CountsSince(t, "recordings_total")
	var all [sessions]proxytest.Shell
	var opening sync.WaitGroup
	atOnce := make(chan struct{}, 20) // are opened; in the end, all are open
	for i := range all {
		opening.Go(func() {
			atOnce <- struct{}{}
			defer func() { <-atOnce }()
			open := proxytest.OpenWebSocket
			if i%2 == 0 {
				open = proxytest.OpenSPDY
			}
			sh, _ := open(t, s, proxytest.ExecTarget)
			if sh == nil {
				t.Error("a session was refused")
				return
			}
			sh.Hear(t, "hello ")
			sh.Say(t, fmt.Sprint("session ", i, "."))
			sh.Hear(t, fmt.Sprint("session ", i, "."))
			all[i] = sh
		})
	}
	opening.Wait()
	if t.Failed() {
		return
	}
	for _, sh := range all[:sessions/2] {
		sh.Leave()
	}
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": sessions / 2})
	recorder.Cut()
	for _, sh := range all[sessions/2:] {
		sh.Say(t, "after")
		sh.Hear(t, "after")
		sh.Leave()
	}
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": sessions / 2, "recordings_total lost": sessions / 2})

	seen := make(map[string]bool)
	for _, r := range recorder.Take() {
		<-r.Ended()
		if _, output := proxytest.ParseCast(t, r.Bytes()); seen[output] {
			t.Errorf("two recordings hold %q", output)
		} else {
			seen[output] = true
		}
	}
	if len(seen) != sessions {
		t.Errorf("the recorder has %d recordings; want %d", len(seen), sessions)
	}
	for deadline := time.Now().Add(15 * time.Second); recorder.Conns() > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond) // between two looks
	}
	if n := recorder.Conns(); n > 0 {
		t.Errorf("%d connections to the recorder are left", n)
	}
	proxytest.WaitForGoroutines(t, before+2, settle)
}
