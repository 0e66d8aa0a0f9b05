// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoiscache"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// changing is a node whose mind can be changed about who alice's address is. It
// counts how often it is asked.
type changing struct {
	*tailnet.Node
	mu    sync.Mutex
	who   *apitype.WhoIsResponse
	err   error
	asked int
}

func newChanging() *changing {
	c := &changing{Node: aliceNode(), who: whoIs(readers)}
	c.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked++
		return c.who, c.err
	}
	return c
}

// says is what the node answers from now on.
func (c *changing) says(who *apitype.WhoIsResponse, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who, c.err = who, err
}

// over returns a request over a connection of its own, and how to make more over
// the same.
func over() func() *http.Request {
	ctx := newRequest("GET", "https://k8s/api").Context()
	return func() *http.Request {
		r := newRequest("GET", "https://k8s/api")
		return r.WithContext(context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer()))
	}
}

// wantUser fails t unless h passes r on as user, or refuses it if user is empty.
func wantUser(t *testing.T, h *Handler, r *http.Request, user string) {
	t.Helper()
	resp, got := serve(t, h, r)
	switch {
	case got == nil && user != "":
		t.Errorf("refused (%s); want it to be passed on as %s", resp.Status, user)
	case got != nil && !slices.Equal(got.Header["Impersonate-User"], []string{user}):
		t.Errorf("passed on as %v; want %q", got.Header["Impersonate-User"], user)
	}
}

func mallory() *apitype.WhoIsResponse {
	return &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: "phone.example.ts.net."},
		UserProfile: &tailcfg.UserProfile{LoginName: "mallory@example.com"},
	}
}

// Tailnets give addresses that are free to whoever comes next.
func TestAnAddressHandedToAnotherNodeIsNeverAnsweredAsTheOldOne(t *testing.T) {
	hour := caddy.Duration(time.Hour)
	node := newChanging()
	h := newHandler(t, caddyfile.Config{CacheTTL: &hour}, node.Node)
	wantUser(t, h, over()(), "alice@example.com")
	node.says(mallory(), nil)
	wantUser(t, h, over()(), "mallory@example.com")
	node.says(nil, tailnet.ErrPeerNotFound)
	wantUser(t, h, over()(), "")
}

func TestRequestsOnAConnectionShareAnAnswerForTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newChanging()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		request := over()
		for range 3 {
			wantUser(t, h, request(), "alice@example.com")
		}
		if node.asked != 1 {
			t.Errorf("three requests asked %d times; want once", node.asked)
		}
		node.says(mallory(), nil)
		time.Sleep(h.TTL() - time.Nanosecond)
		wantUser(t, h, request(), "alice@example.com")
		time.Sleep(time.Nanosecond)
		wantUser(t, h, request(), "mallory@example.com")
		node.says(nil, errors.New("no answer"))
		time.Sleep(h.TTL())
		wantUser(t, h, request(), "")
	})
}

// What has changed while a node was answering may not be in its answer.
func TestADecisionIsAsOldAsItsQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := aliceNode()
		answer := node.Ask
		node.Ask = func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			time.Sleep(time.Second) // of the bubble's clock
			return answer(ctx, remote, local)
		}
		began := time.Now()
		d, err := newHandler(t, caddyfile.Config{}, node).decide(t.Context(), whoiscache.Key{Node: node, Remote: netip.MustParseAddr(aliceAddr), Local: netip.MustParseAddr(nodeAddr)})
		if err != nil {
			t.Fatal(err)
		}
		if !d.asked.Equal(began) {
			t.Errorf("it is said to be from %v after the question; want it to be as old", d.asked.Sub(began))
		}
	})
}

func TestWithoutACacheEveryRequestAsks(t *testing.T) {
	var none caddy.Duration
	node := newChanging()
	h := newHandler(t, caddyfile.Config{CacheTTL: &none}, node.Node)
	request := over()
	wantUser(t, h, request(), "alice@example.com")
	node.says(mallory(), nil)
	wantUser(t, h, request(), "mallory@example.com")
}

// What one handler has decided is not what another one decides, on the same
// connection as well.
func TestHandlersOnAConnectionDecideByThemselves(t *testing.T) {
	node := newChanging()
	node.who.CapMap["example.com/cap/staging"] = []tailcfg.RawMessage{`{"impersonate":{"groups":["staging"]}}`}
	production := newHandler(t, caddyfile.Config{}, node.Node)
	staging := newHandler(t, caddyfile.Config{Capability: "example.com/cap/staging"}, node.Node)
	request := over()
	for range 2 {
		for h, group := range map[*Handler]string{production: "tailnet-readers", staging: "staging"} {
			_, got := serve(t, h, request())
			if got == nil || !slices.Equal(got.Header["Impersonate-Group"], []string{group}) {
				t.Errorf("passed on in the wrong groups; want %s: %+v", group, got)
			}
		}
	}
}

// Requests that are open when the caller loses its group end, and say why.
func TestAnOpenRequestEndsWithTheRightToIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newChanging()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		r := over()()
		ended := make(chan error)
		watch := caddyNext(func(r *http.Request) {
			<-r.Context().Done()
			ended <- context.Cause(r.Context())
		})
		go func() { _ = h.ServeHTTP(noAnswer{}, r, watch) }()
		time.Sleep(time.Minute)
		select {
		case err := <-ended:
			t.Fatalf("ended too soon: %v", err)
		default:
		}
		node.says(whoIs(), nil)
		withdrawn := time.Now()
		err := <-ended
		if took := time.Since(withdrawn); took > h.Interval() {
			t.Errorf("it took %v; want at most %v", took, h.Interval())
		}
		if err == nil || err.Error() != "access was withdrawn: alice@example.com is no longer in group tailnet-readers" {
			t.Errorf("the cause is %v", err)
		}
	})
}

// A connection that may be a session goes on only as long as sessions need not be
// recorded. What is none goes on.
func TestAnOpenSessionEndsWhenSessionsHaveToBeRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newChanging()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		session, watch := over()(), over()()
		session.Header.Set("Connection", "Upgrade")
		session.Header.Set("Upgrade", "websocket")
		leave := make(chan struct{})
		// open sends r, and returns why it has ended, nil if it had not by leave.
		open := func(r *http.Request) <-chan error {
			ended := make(chan error, 1)
			go func() {
				_ = h.ServeHTTP(noAnswer{}, r, caddyNext(func(r *http.Request) {
					select {
					case <-r.Context().Done():
						ended <- context.Cause(r.Context())
					case <-leave:
						ended <- nil
					}
				}))
			}()
			return ended
		}
		ended, watching := open(session), open(watch)
		time.Sleep(time.Minute)
		node.says(whoIs(readers, enforced), nil)
		time.Sleep(time.Minute)
		close(leave)
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "have to be recorded") {
			t.Errorf("the cause is %v", err)
		}
		if err := <-watching; err != nil {
			t.Errorf("the watch has ended as well: %v", err)
		}
	})
}

// caddyNext is a next handler.
type caddyNext func(*http.Request)

func (f caddyNext) ServeHTTP(_ http.ResponseWriter, r *http.Request) error {
	f(r)
	return nil
}

// Behind another handler that authenticates, what is logged is what the API server is
// told.
func TestThePlaceholdersAreThoseOfTheIdentity(t *testing.T) {
	h := newHandler(t, caddyfile.Config{Capability: "example.com/cap/none"}, newChanging().Node)
	r := over()()
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	repl.Set("http.auth.user.id", "somebody else")
	if err := h.ServeHTTP(noAnswer{}, r, nothing{}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{userID: "alice@example.com", placeholders + "groups": "", placeholders + "source": "none"} {
		if got, _ := repl.GetString(name); got != want {
			t.Errorf("{%s} is %q; want %q", name, got, want)
		}
	}
}
