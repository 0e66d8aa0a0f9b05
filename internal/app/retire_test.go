// SPDX-License-Identifier: Apache-2.0

package app_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
)

// shared is a tailnet listener that configs share, as with caddy-tailscale: to close a
// config's handle does not wake a call of Accept.
var shared net.Listener

// waiting is how many calls of Accept wait.
var waiting atomic.Int32

// loaded is the app of the config that was loaded last.
var loaded *app.App

type handle struct {
	net.Listener
	closed atomic.Bool
}

func (h *handle) Accept() (net.Conn, error) {
	if h.closed.Load() {
		return nil, net.ErrClosed
	}
	waiting.Add(1)
	defer waiting.Add(-1)
	return h.Listener.Accept()
}

func (h *handle) Close() error {
	h.closed.Store(true)
	return nil
}

func init() {
	caddy.RegisterNetwork("sharedtest", func(context.Context, string, string, string, uint, net.ListenConfig) (any, error) {
		return &handle{Listener: shared}, nil
	})
	caddy.RegisterNetwork("failtest", func(context.Context, string, string, string, uint, net.ListenConfig) (any, error) {
		return nil, errors.New("this network has no listeners")
	})
}

// loadServer runs a config with a server that has no handler of ours, as that for
// redirects.
func loadServer(t *testing.T, listen ...string) error {
	t.Helper()
	provisioned = func(ctx caddy.Context) (err error) {
		loaded, err = app.Of(ctx)
		return err
	}
	config, err := json.Marshal(map[string]any{
		"admin": map[string]any{"disabled": true},
		"apps": map[string]any{
			"app_test_user": struct{}{},
			"http":          map[string]any{"servers": map[string]any{"main": map[string]any{"listen": listen}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return caddy.Load(config, true)
}

// Only the running config accepts connections, whether its reload succeeded or a later
// one failed.
func TestApp_OnlyRunningConfigAccepts(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	node := &tsnet.Server{Dir: t.TempDir(), ControlURL: "http://127.0.0.1:1", UserLogf: func(string, ...any) {}}
	defer node.Close()
	var err error
	if shared, err = node.Listen("tcp", ":80"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stopped = nil
		if err := errors.Join(shared.Close(), caddy.Stop()); err != nil {
			t.Error(err)
		}
	}()
	check := func(after string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); waiting.Load() != 1; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("after %s, %d configs accept connections; want 1", after, waiting.Load())
			}
		}
	}
	// What the old config still accepts when its server stops would not be answered.
	stopped = func() { check("the event that the old config is stopping") }
	for range 3 {
		if err := loadServer(t, "sharedtest/node:80"); err != nil {
			t.Fatal(err)
		}
		check("a reload")
	}
	// Caddy stops the apps of a config that fails to start without that event.
	checked := stopped
	stopped = nil
	if err := loadServer(t, "sharedtest/node:80", "failtest/node:81"); err == nil {
		t.Fatal("a config whose second listener fails was loaded")
	}
	stopped = checked
	check("a reload that failed")
	if err := loadServer(t, "sharedtest/node:80"); err != nil {
		t.Fatal(err)
	}
	check("the reload after that")
}

// Caddy would wait for a listener that it closes itself, whatever its grace_period is. The
// last one of a tailnet node may never close.
func TestExit_LeavesCaddyNoTailnetListener(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	node := &tsnet.Server{Dir: t.TempDir(), ControlURL: "http://127.0.0.1:1", UserLogf: func(string, ...any) {}}
	defer node.Close()
	var err error
	if shared, err = node.Listen("tcp", ":80"); err != nil {
		t.Fatal(err)
	}
	if err := loadServer(t, "sharedtest/node:80"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(shared.Close(), caddy.Stop()); err != nil {
			t.Error(err)
		}
	}()
	for deadline := time.Now().Add(10 * time.Second); waiting.Load() != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server accepts no connection")
		}
	}
	app.Exit(loaded)
	for deadline := time.Now().Add(10 * time.Second); waiting.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server still accepts connections")
		}
	}
}
