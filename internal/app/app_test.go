// SPDX-License-Identifier: Apache-2.0

package app_test

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	// The events app.
	_ "github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// provisioned is called for every module user that Caddy provisions.
var provisioned func(caddy.Context) error

// stopped is called when Caddy stops a module user, unless it is nil.
var stopped func()

// user is an app that uses the app under test, as handlers do.
type user struct{}

func init() { caddy.RegisterModule(user{}) }

func (user) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "app_test_user", New: func() caddy.Module { return new(user) }}
}
func (user) Provision(ctx caddy.Context) error { return provisioned(ctx) }
func (user) Start() error                      { return nil }
func (user) Stop() error {
	if stopped != nil {
		stopped()
	}
	return nil
}

// run runs a config whose modules use the app as uses does.
func run(t *testing.T, uses func(caddy.Context) error) {
	t.Helper()
	provisioned = uses
	config, err := json.Marshal(map[string]any{
		"admin": map[string]any{"disabled": true},
		"apps": map[string]any{
			"app_test_user": struct{}{},
			"http":          map[string]any{"grace_period": "7s", "shutdown_delay": "2s"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = caddy.Stop() })
}

func newAuthenticator(t *testing.T) *authn.Authenticator {
	t.Helper()
	a, err := authn.New(authn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newPolicy() revocation.Policy {
	return revocation.Policy{
		Interval: time.Millisecond,
		Grace:    time.Hour,
		Identify: func(context.Context, netip.Addr, netip.AddrPort, time.Time) (*impersonate.Identity, error) {
			return new(impersonate.Identity), nil
		},
		Revoked: func(*revocation.Revoked) {},
	}
}

// track opens a request of a peer.
func track(t *testing.T, tracker *revocation.Tracker) *revocation.Request {
	t.Helper()
	r := httptest.NewRequest("GET", "/api?watch=true", nil)
	r = r.WithContext(tailnet.WithConn(r.Context(), netip.MustParseAddrPort("100.64.0.2:1"), netip.MustParseAddr("100.64.0.1")))
	conn, err := tailnet.ConnFrom(r.Context())
	if err != nil {
		t.Fatal(err)
	}
	return tracker.Track(r, authn.Caller{Identity: new(impersonate.Identity), Conn: conn})
}

// process returns the state of the process, of which the caller holds no reference.
func process() *app.Process {
	p := app.Acquire()
	p.Release()
	return p
}

func TestOf_ModulesOfOneConfigShareTheApp(t *testing.T) {
	var apps []*app.App
	use := func(ctx caddy.Context) error {
		for range 2 {
			a, err := app.Of(ctx)
			if err != nil {
				return err
			}
			apps = append(apps, a)
		}
		return nil
	}
	run(t, use)
	run(t, use)
	if len(apps) != 4 {
		t.Fatalf("got %d apps; want 4", len(apps))
	}
	if apps[0] != apps[1] || apps[2] != apps[3] {
		t.Error("two modules of one config have different apps; want one")
	}
	if apps[0] == apps[2] {
		t.Error("two configs have the same app; want one each")
	}
}

func TestPeriods_AreThoseOfTheHTTPApp(t *testing.T) {
	var a *app.App
	run(t, func(ctx caddy.Context) (err error) {
		a, err = app.Of(ctx)
		return err
	})
	if delay, grace := app.Periods(a); delay != 2*time.Second || grace != 7*time.Second {
		t.Errorf("got shutdown_delay %v and grace_period %v", delay, grace)
	}
}

func TestRunning_ListsAuthenticatorsOfRunningConfig(t *testing.T) {
	first, second := newAuthenticator(t), newAuthenticator(t)
	started := 0
	use := func(authenticator *authn.Authenticator) func(caddy.Context) error {
		return func(ctx caddy.Context) error {
			a, err := app.Of(ctx)
			if err != nil {
				return err
			}
			a.OnStarted(authenticator, func() {
				started++
				if slices.Contains(process().Running(), authenticator) {
					t.Error("the authenticator is listed before it has been started")
				}
			})
			return nil
		}
	}
	run(t, use(first))
	if got := process().Running(); !slices.Equal(got, []*authn.Authenticator{first}) {
		t.Errorf("got %v running; want the first config's", got)
	}
	run(t, use(second))
	if got := process().Running(); !slices.Equal(got, []*authn.Authenticator{second}) {
		t.Errorf("after a reload, got %v running; want the second config's", got)
	}
	if started != 2 {
		t.Errorf("%d authenticators were started; want 2", started)
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if got := process().Running(); len(got) > 0 {
		t.Errorf("after Caddy stopped, got %v running; want none", got)
	}
}

func TestProcess_OutlivesConfigWhileRequestsAreOpen(t *testing.T) {
	var tracker *revocation.Tracker
	run(t, func(ctx caddy.Context) error {
		a, err := app.Of(ctx)
		if err != nil {
			return err
		}
		tracker = a.Generation().NewTracker([]string{":443"}, nil, newPolicy())
		return nil
	})
	request := track(t, tracker)
	during := process()
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	if process() != during || len(process().Requests.Clients()) != 1 {
		t.Error("the open request is unknown once its config is gone; want it listed")
	}
	request.Close()
	for deadline := time.Now().Add(10 * time.Second); process() == during; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the state is kept after the last request has ended; want it released")
		}
	}
}

func TestHandle_NewConfigJudgesOpenRequests(t *testing.T) {
	var tracker *revocation.Tracker
	use := func(settings string, policy revocation.Policy) func(caddy.Context) error {
		return func(ctx caddy.Context) error {
			a, err := app.Of(ctx)
			if err != nil {
				return err
			}
			tracker = a.Generation().NewTracker([]string{":443"}, settings, policy)
			return nil
		}
	}
	run(t, use("old", newPolicy()))
	request := track(t, tracker)
	defer request.Close()
	refusing := newPolicy()
	refusing.Identify = func(context.Context, netip.Addr, netip.AddrPort, time.Time) (*impersonate.Identity, error) {
		return nil, apistatus.Forbidden(apistatus.Guard, "no access")
	}
	run(t, use("new", refusing))
	select {
	case <-request.Done():
	case <-time.After(10 * time.Second):
		t.Error("the request goes on under the policy of the config that is gone; want it ended by the new config's")
	}
}
