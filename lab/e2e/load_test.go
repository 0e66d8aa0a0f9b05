// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/procfs"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/conformance"
)

// load is a steady trickle of requests from several callers, over reused connections
// (HTTP/2) and new ones (HTTP/1.1), during a fault.
type load struct {
	callers []*loadCaller
	end     chan struct{}
	running sync.WaitGroup
}

// loadCaller is a caller of a load.
type loadCaller struct {
	name string
	// may are the identities that the caller may have, in this order. Once an
	// identity has been followed by another, it must not come back.
	may []conformance.Identity

	mu      sync.Mutex
	answers map[int]int // by status, 0 for no answer
}

// pace is the time between two requests of a caller.
const pace = 25 * time.Millisecond

// underLoad calls f while bob and carol send requests, and callers that f adds.
// Whatever f does to the lab, every request that arrives has the identity of its
// caller, and no request leaves anything behind. The module's own goroutines end
// soon. Connections to the upstream are kept for a minute, so files are counted only
// with -long.
func underLoad(t *testing.T, f func(l *load)) {
	t.Helper()
	before := theFootprint(t)
	encrypted.take()
	l := &load{end: make(chan struct{})}
	stop := sync.OnceFunc(func() { close(l.end); l.running.Wait() })
	defer stop() // also if the test fails before the call below
	l.add(t, theLab.Callers["bob"], conformance.Identity{User: "bob@example.com", Groups: []string{"tailnet-readers"}})
	l.add(t, theLab.Callers["carol"], conformance.Identity{User: "carol@example.com"})
	l.wantProgress(t, "bob", "carol")
	eventually(t, "a request is in the footprint", func() error {
		if during := theFootprint(t); during.module == 0 || during.caddy == 0 || during.upstream == 0 {
			return fmt.Errorf("%+v", during)
		}
		return nil
	})
	f(l)
	stop()
	l.judge(t, encrypted.take())
	for _, c := range l.callers {
		t.Logf("%s: answers by status: %v", c.name, c.answers)
	}
	eventually(t, "the goroutines of requests have ended", func() error {
		if after := theFootprint(t); after.module > before.module {
			return fmt.Errorf("%d goroutines of the module; want at most %d", after.module, before.module)
		}
		return nil
	})
	if !*long {
		return
	}
	within(t, idleFor+30*time.Second, "the connections of requests are closed", func() error {
		after := theFootprint(t)
		if after.caddy > before.caddy || after.upstream > before.upstream {
			return fmt.Errorf("%d goroutines of Caddy's and %d connections to the upstream; want at most %d and %d", after.caddy, after.upstream, before.caddy, before.upstream)
		}
		if after.files > before.files+spare {
			return fmt.Errorf("%d open files; want at most %d more than %d", after.files, spare, before.files)
		}
		return nil
	})
}

// idleFor is how long transport kubernetes keeps an idle connection.
const idleFor = time.Minute

// spare is how many more files may be open at the end, as other parts of this
// process open files too, such as the sockets and logs of a dozen tailnet nodes.
// Files that requests leave are counted separately, and there must be none: callers
// are in a network stack without files, and the upstream is behind a socket.
const spare = 4

// add adds a caller, which may have the given identities one after the other.
func (l *load) add(t *testing.T, caller *lab.Caller, identities ...conformance.Identity) {
	t.Helper()
	c := &loadCaller{name: caller.Name, may: identities, answers: make(map[int]int)}
	l.callers = append(l.callers, c)
	for proto, url := range map[string]string{
		"HTTP/1.1": "http://" + lab.ProxyName + ":" + portRecorded,
		"HTTP/2.0": "https://" + lab.ProxyName + "." + lab.Domain + ":" + portRecordedTLS,
	} {
		client := clientOf(t, caller, proto)
		client.Transport.(*http.Transport).DisableKeepAlives = proto == "HTTP/1.1"
		client.Timeout = 15 * time.Second
		l.running.Go(func() {
			defer client.CloseIdleConnections()
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				case <-tick.C:
				}
				status := ask(client, fmt.Sprintf("%s/load/%s/%s/%d", url, c.name, strings.ReplaceAll(proto, "/", "-"), n))
				c.mu.Lock()
				c.answers[status]++
				c.mu.Unlock()
			}
		})
	}
}

// ask sends a GET request and returns the status of the answer, or 0 if there is
// none.
func ask(client *http.Client, url string) int {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return 0
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0
	}
	return resp.StatusCode
}

// answered returns how many of a caller's requests were answered with a status.
func (l *load) answered(name string, status int) int {
	c := l.callers[slices.IndexFunc(l.callers, func(c *loadCaller) bool { return c.name == name })]
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.answers[status]
}

// wantProgress waits until some more requests of each caller succeed.
func (l *load) wantProgress(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		had := l.answered(name, http.StatusOK)
		within(t, time.Minute, "requests of "+name+" get through", func() error {
			if n := l.answered(name, http.StatusOK) - had; n < 10 {
				return fmt.Errorf("%d of them", n)
			}
			return nil
		})
	}
}

// wantOnlyOK fails the test if callers' requests did not succeed. On a busy machine,
// the node may identify a few callers too late; these requests get a 503 and may be
// retried.
func (l *load) wantOnlyOK(t *testing.T, names ...string) {
	t.Helper()
	for _, c := range l.callers {
		if !slices.Contains(names, c.name) {
			continue
		}
		c.mu.Lock()
		passed, again := c.answers[http.StatusOK], c.answers[http.StatusServiceUnavailable]
		if len(c.answers) > 2 || (len(c.answers) == 2 && again == 0) || again > passed/20 {
			t.Errorf("requests of %s were answered with (by status) %v; want 200, and a few 503 at most", c.name, c.answers)
		}
		c.mu.Unlock()
	}
}

// judge fails the test unless every request arrived with its caller's identity.
func (l *load) judge(t *testing.T, arrived []*http.Request) {
	t.Helper()
	type stream struct{ caller, proto string }
	type seen struct{ n, identity int }
	order := make(map[stream][]seen)
	for _, r := range arrived {
		parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/load/"), "/")
		if !strings.HasPrefix(r.URL.Path, "/load/") || len(parts) != 3 {
			continue // not from this load
		}
		i := slices.IndexFunc(l.callers, func(c *loadCaller) bool { return c.name == parts[0] })
		n, err := strconv.Atoi(parts[2])
		if i < 0 || err != nil {
			t.Fatalf("a request of an unknown caller arrived: %s", r.URL.Path)
		}
		users, groups := r.Header["Impersonate-User"], r.Header["Impersonate-Group"]
		identity := slices.IndexFunc(l.callers[i].may, func(id conformance.Identity) bool {
			return slices.Equal(users, []string{id.User}) && slices.Equal(groups, id.Groups)
		})
		if identity < 0 || r.Header.Get("Authorization") != "Bearer "+recorderToken {
			t.Errorf("%s arrived as user %q in groups %q; want one of %+v", r.URL.Path, users, groups, l.callers[i].may)
		}
		key := stream{parts[0], parts[1]}
		order[key] = append(order[key], seen{n, identity})
	}
	for key, all := range order {
		slices.SortFunc(all, func(a, b seen) int { return a.n - b.n })
		if !slices.IsSortedFunc(all, func(a, b seen) int { return a.identity - b.identity }) {
			t.Errorf("%s over %s returned to an earlier identity: %v", key.caller, key.proto, all)
		}
	}
	for _, c := range l.callers {
		for _, proto := range []string{"HTTP-1.1", "HTTP-2.0"} {
			if len(order[stream{c.name, proto}]) == 0 {
				t.Errorf("no request of %s over %s arrived", c.name, proto)
			}
		}
	}
}

// footprint is what requests hold. The goroutines of tailnet nodes come and go all
// the time, so they are not counted.
type footprint struct {
	module, caddy int // goroutines
	upstream      int // sockets connected to the upstream of the load
	files         int // all open files
}

// ofModule matches the stacks of the module's goroutines, but not those of the lab
// and of the test's recorders.
var ofModule = regexp.MustCompile(`caddy-tailscale-impersonate(\.\(\*Handler\)|/internal/(authn|recorder|revocation|tailnet|transport)\.)`)

func theFootprint(t *testing.T) (f footprint) {
	t.Helper()
	f.files, f.upstream = openFiles(t, netip.MustParseAddrPort(encrypted.addr))
	buffer := make([]byte, 64<<20)
	buffer = buffer[:runtime.Stack(buffer, true)]
	for stack := range strings.SplitSeq(string(buffer), "\n\n") {
		if strings.Contains(stack, "caddyserver/caddy/v2/modules/caddyhttp") {
			f.caddy++
		}
		if ofModule.MatchString(stack) {
			f.module++
		}
	}
	return f
}

// openFiles returns how many files this process has open, and how many of them are
// sockets connected to remote.
func openFiles(t *testing.T, remote netip.AddrPort) (all, connected int) {
	t.Helper()
	self, err := procfs.Self()
	if err != nil {
		t.Fatal(err)
	}
	targets, err := self.FileDescriptorTargets()
	if err != nil {
		t.Fatal(err)
	}
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		t.Fatal(err)
	}
	sockets, err := fs.NetTCP() //nolint:staticcheck // reading /proc is slow with many sockets, but simple
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sockets {
		if s.RemPort == uint64(remote.Port()) && s.RemAddr.Equal(remote.Addr().AsSlice()) && slices.Contains(targets, fmt.Sprintf("socket:[%d]", s.Inode)) {
			connected++
		}
	}
	return len(targets), connected
}
