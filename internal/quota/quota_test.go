// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func peer(i int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}) }

// request returns a request of the i-th caller. cancel ends its stream.
func request(i int, target string) (r *http.Request, cancel context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	ctx = tailnet.WithConn(ctx, netip.AddrPortFrom(peer(i), 40000), peer(0))
	return httptest.NewRequestWithContext(ctx, http.MethodGet, target, nil), cancel
}

// admit admits requests of the i-th caller, each on a connection of its own, until one
// is refused, and returns their contexts.
func admit(t *testing.T, b *Budget, i int, target string) (admitted []context.Context) {
	t.Helper()
	for {
		r, _ := request(i, target)
		_, c, err := b.Admit(httptest.NewRecorder(), r)
		if err != nil {
			if got := apistatus.ReasonOf(err); got != apistatus.TooMuch {
				t.Fatalf("refused for %q: %v", got, err)
			}
			c.Close()
			return admitted
		}
		admitted = append(admitted, r.Context())
	}
}

func TestBudget_CallerGetsHalf(t *testing.T) {
	b := &Budget{Size: 60 * answer}
	if n := len(admit(t, b, 1, "/openapi/v2")); n < 28 || n > 30 {
		t.Errorf("a caller alone may have %d of 60 answers; want half", n)
	}
	b = new(Budget)
	if n := len(admit(t, b, 1, "/openapi/v2")); n > maxShare/answer {
		t.Errorf("a caller alone may have %d answers; want at most %d", n, maxShare/answer)
	}
}

func TestBudget_ManyCallersLeaveRoomForOne(t *testing.T) {
	b := &Budget{Size: OfLimit(350 << 20)} // of the shipped manifest
	// One after the other, so that the first ones take all there is.
	for i := range 100 {
		admit(t, b, 1+i, "/openapi/v2")
	}
	innocent := admit(t, b, 1000, "/api/v1/pods")
	if n := len(innocent); n < 4 {
		t.Errorf("after 100 callers took all they could, another one may have %d answers; want a few", n)
	}
	for i := range 100 {
		admit(t, b, 1+i, "/openapi/v2")
	}
	for _, ctx := range innocent[:4] {
		if ctx.Err() != nil {
			t.Error("a caller that holds less than the others lost a connection to them")
		}
	}
	if b.held > b.Size {
		t.Errorf("%d bytes are held; want at most %d", b.held, b.Size)
	}
}

func TestBudget_GivesBackAll(t *testing.T) {
	for _, proto := range []int{1, 2} {
		b := &Budget{Size: 100 * answer}
		for _, target := range []string{"/api", "/api?watch=true", "/api/v1/namespaces/default/pods/web/exec?command=sh"} {
			r, end := request(1, target)
			r.ProtoMajor = proto
			if strings.Contains(target, "exec") {
				r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
			}
			_, c, err := b.Admit(httptest.NewRecorder(), r)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			// The end of an HTTP/2 answer is still waiting for its client.
			if held := b.holds(peer(1)); (held != 0) != (proto == 2) {
				t.Errorf("HTTP/%d, %s: %d bytes are held after the handler has returned", proto, target, held)
			}
			end()
			for b.holds(peer(1)) != 0 {
				runtime.Gosched()
			}
		}
		if len(b.callers) != 0 || b.held != 0 {
			t.Errorf("HTTP/%d: %v and %d bytes are left", proto, b.callers, b.held)
		}
	}
}

func (b *Budget) holds(caller netip.Addr) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if h := b.callers[caller]; h != nil {
		return h.bytes
	}
	return 0
}

func TestAdmit_CountsHeaderFields(t *testing.T) {
	b := new(Budget)
	for n, want := range map[int]apistatus.Reason{maxFields: "", maxFields + 1: apistatus.HeaderFields} {
		r, _ := request(1, "/api")
		for range n {
			r.Header["A"] = append(r.Header["A"], "")
		}
		_, c, err := b.Admit(httptest.NewRecorder(), r)
		c.Close()
		if want == "" && err != nil || want != "" && (err == nil || apistatus.ReasonOf(err) != want) {
			t.Errorf("%d fields: got %v; want %q", n, err, want)
		}
	}
	r, _ := request(1, "/api")
	for i := range 31_000 {
		r.Header[fmt.Sprint(i)] = []string{""}
	}
	if fields, size := measure(r); fields != 31_000 || size < 31_000*200 {
		t.Errorf("31,000 fields of a few bytes count as %d, with %d bytes", fields, size)
	}
}

// Refusals wait for the client to read them, too.
func TestAdmit_TooManyRefusalsEndTheConnection(t *testing.T) {
	b := &Budget{Size: 8 * answer}
	admit(t, b, 1, "/api")
	refused := 0
	for ended := false; !ended; {
		r, _ := request(1, "/api")
		func() {
			defer func() {
				if v := recover(); v != nil {
					if v != any(http.ErrAbortHandler) {
						panic(v)
					}
					ended = r.Context().Err() != nil
				}
			}()
			if _, _, err := b.Admit(httptest.NewRecorder(), r); err == nil {
				t.Fatal("a request beyond the share was admitted")
			}
			refused++
		}()
		if refused > maxRefusals/refusal+1 {
			t.Fatalf("%d refusals are held", refused)
		}
	}
	if refused == 0 {
		t.Error("the first request beyond the share was not answered")
	}
}

func TestAdmit_BoundsWaitingSessions(t *testing.T) {
	b := new(Budget)
	open := func() (http.ResponseWriter, Charge, error) {
		r, _ := request(1, "/api/v1/namespaces/default/pods/web/exec?command=sh")
		r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
		return b.Admit(httptest.NewRecorder(), r)
	}
	var first http.ResponseWriter
	for i := range maxWaiting {
		w, _, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = w
		}
	}
	_, c, err := open()
	if apistatus.ReasonOf(err) != apistatus.Waiting {
		t.Fatalf("got %v", err)
	}
	c.Close()
	// An answer makes room for the next session.
	_, _, _ = http.NewResponseController(first).Hijack()
	if _, _, err := open(); err != nil {
		t.Error(err)
	}
}

func TestConnections_Count(t *testing.T) {
	b := &Budget{Size: 10 * connection}
	open := func() (net.Conn, context.Context) {
		c, _ := net.Pipe()
		r, _ := request(1, "/")
		return c, b.ConnContext(r.Context(), c)
	}
	var conns []net.Conn
	for {
		c, ctx := open()
		if ctx.Err() != nil {
			break // it was closed
		}
		if again := b.ConnContext(ctx, c); again != ctx {
			t.Fatal("a connection is counted twice")
		}
		conns = append(conns, c)
	}
	if len(conns) != 5 {
		t.Errorf("a caller may have %d connections of 10; want half", len(conns))
	}
	for i, c := range conns {
		b.ConnState(c, []http.ConnState{http.StateClosed, http.StateHijacked}[i%2])
		b.ConnState(c, http.StateClosed)
	}
	if b.held != 0 || len(b.callers) != 0 || len(b.conns) != 0 {
		t.Errorf("%d bytes, %v and %v are left", b.held, b.callers, b.conns)
	}
}

// The headers of a request are in memory before any handler sees it.
func TestConnections_SlowHeadersCount(t *testing.T) {
	for size, affordable := range map[int64]bool{100 * slow: true, 3 * connection: false} {
		b := &Budget{Size: size}
		c, _ := net.Pipe()
		r, _ := request(1, "/")
		ctx := b.ConnContext(r.Context(), c)
		a := b.conns[c]
		b.takeSlow(a) // as the timer does
		if closed := ctx.Err() != nil; closed == affordable {
			t.Errorf("with a budget of %d bytes, the connection was closed: %t", size, closed)
		}
		if held := b.holds(peer(1)); affordable && held != connection+slow {
			t.Errorf("%d bytes are held while headers arrive", held)
		}
		for _, state := range []http.ConnState{http.StateActive, http.StateIdle, http.StateActive, http.StateIdle, http.StateClosed} {
			b.ConnState(c, state)
			want := map[bool]int64{true: 0, false: connection}[state == http.StateClosed]
			if b.holds(peer(1)) != want {
				t.Errorf("%d bytes are held when the connection is %s; want %d", b.holds(peer(1)), state, want)
			}
			// As the timer does, twice.
			b.takeSlow(a)
			b.takeSlow(a)
			if affordable && state == http.StateIdle {
				want += slow
			}
			if b.holds(peer(1)) != want {
				t.Errorf("%d bytes are held some time after the connection is %s; want %d", b.holds(peer(1)), state, want)
			}
		}
		if b.takeSlow(a); b.held != 0 {
			t.Errorf("%d bytes are counted after the end", b.held)
		}
	}
}

func TestHold_CountsForTheConnection(t *testing.T) {
	b := &Budget{Size: 10 * connection}
	c, _ := net.Pipe()
	r, _ := request(1, "/")
	ctx := b.ConnContext(r.Context(), c)
	if !b.Hold(ctx, connection) || b.holds(peer(1)) != 2*connection {
		t.Errorf("%d bytes are held; want those of two connections", b.holds(peer(1)))
	}
	if b.Hold(ctx, 5*connection) {
		t.Error("a caller may hold more than its share")
	}
	if b.Hold(ctx, -connection); b.holds(peer(1)) != connection {
		t.Errorf("%d bytes are held; want those of the connection", b.holds(peer(1)))
	}
	if !b.Hold(t.Context(), 100*connection) {
		t.Error("what belongs to no connection is refused")
	}
}

// What is held for a request counts with its connection, until it is released, once.
func TestReserve_CountsUntilReleased(t *testing.T) {
	b := &Budget{Size: 60 * answer}
	r, _ := request(1, "/recordings")
	release, err := b.Reserve(r.Context(), 20*answer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Reserve(r.Context(), 20*answer); apistatus.ReasonOf(err) != apistatus.TooMuch {
		t.Errorf("got %v; want a refusal, as the caller would hold more than half", err)
	}
	if n := len(admit(t, b, 1, "/openapi/v2")); n < 8 || n > 10 {
		t.Errorf("a caller that holds 20 may have %d of 30 answers", n)
	}
	release()
	release()
	r, _ = request(2, "/recordings")
	if release, err = b.Reserve(r.Context(), 30*answer); err != nil {
		t.Errorf("another caller: %v", err)
	} else {
		release()
	}
}
