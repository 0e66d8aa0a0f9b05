// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

var (
	concurrencies = []int{1, 16, 64}
	peerCounts    = []int{10, 1_000, 10_000}
)

const (
	watchRounds  = 6 // the fewest whose interval has 95 %
	streamRounds = 10
	streamSize   = 50_000_000
)

// report holds all measurements.
type report struct {
	o       options
	handler map[string][]float64            // by case and unit
	loads   map[loadKey]map[string][]sample // of small answers, by proxy
	kubectl map[string][]sample             // by proxy
	lists   map[string][]sample             // by proxy
	watches map[string][]watched            // by proxy
	streams map[string][]float64            // MB/s, by command and proxy
	peers   map[int]map[string][]sample     // by peers and proxy
	growth  map[string][]sample             // of the plugin and the bare proxy, by proxy and peers
}

func newReport(o options) *report {
	return &report{
		o:       o,
		handler: make(map[string][]float64),
		loads:   make(map[loadKey]map[string][]sample),
		kubectl: make(map[string][]sample),
		lists:   make(map[string][]sample),
		growth:  make(map[string][]sample),
		watches: make(map[string][]watched),
		streams: make(map[string][]float64),
		peers:   make(map[int]map[string][]sample),
	}
}

// connection is what a request is sent on.
type connection string

const (
	kept     connection = "a kept connection"
	newTLS   connection = "a new connection, TLS 1.3 and HTTP/2"
	newPlain connection = "a new connection, plain HTTP"
)

// loadKey names a comparison of small answers.
type loadKey struct {
	on      connection
	callers int
}

func (k loadKey) String() string { return fmt.Sprintf("%s, %s", k.on, callersOf(k.callers)) }

func callersOf(n int) string {
	if n == 1 {
		return "1 caller"
	}
	return fmt.Sprintf("%d callers", n)
}

// measured reports whether there are small answers on that kind of connection.
func (r *report) measured(on connection) bool {
	return len(r.loads[loadKey{on, concurrencies[0]}]) > 0
}

// cpus returns the CPU time of a request in each round, in microseconds.
func cpus(samples []sample) []float64 { return each(samples, sample.perRequest) }

func ms(d func(sample) time.Duration) func(sample) float64 {
	return func(s sample) float64 { return float64(d(s).Microseconds()) / 1e3 }
}

// print writes the tables and the targets as Markdown.
func (r *report) print(w io.Writer) {
	table := func(title string, header ...string) func(...string) {
		fmt.Fprintf(w, "### %s\n\n| %s |\n|%s\n", title, strings.Join(header, " | "), strings.Repeat(" --- |", len(header)))
		return func(cells ...string) { fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | ")) }
	}
	p50 := func(samples []sample) string {
		return estimateOf(each(samples, ms(func(s sample) time.Duration { return s.p50 }))).show(1)
	}
	p99 := func(samples []sample) string {
		return estimateOf(each(samples, ms(func(s sample) time.Duration { return s.p99 }))).show(1)
	}
	cpuOf := func(samples []sample) (each, perSecond string) {
		if e := estimateOf(cpus(samples)); e.median > 0 {
			return e.show(0), fmt.Sprintf("%.0f", 1e6/e.median)
		}
		return "-", "-"
	}
	if len(r.kubectl) > 0 {
		row := table("`kubectl get` from start to end", "through", "rounds", "CPU of the proxy per command, us", "p50, ms", "slowest of a round, ms")
		for _, kind := range all {
			samples := r.kubectl[kind]
			cpu, _ := cpuOf(samples)
			row(kind, fmt.Sprint(len(samples)), cpu, p50(samples), p99(samples))
		}
		fmt.Fprintln(w)
	}
	for _, on := range []connection{newTLS, newPlain, kept} {
		if !r.measured(on) {
			continue
		}
		row := table("A small answer (2 KB) on "+string(on), "callers", "through", "rounds", "CPU of the proxy per request, us", "requests per CPU-second", "p50, ms", "p99, ms", "dialled again")
		for _, callers := range concurrencies {
			for _, kind := range all {
				samples := r.loads[loadKey{on, callers}][kind]
				if len(samples) == 0 {
					continue
				}
				cpu, perSecond := cpuOf(samples)
				var again, requests int
				for _, s := range samples {
					again, requests = again+s.redialled, requests+s.requests
				}
				row(fmt.Sprint(callers), kind, fmt.Sprint(len(samples)), cpu, perSecond, p50(samples), p99(samples), fmt.Sprintf("%d of %d", again, requests))
			}
		}
		fmt.Fprintln(w)
	}
	if len(r.lists) > 0 {
		row := table("A list of 5 MB", "through", "CPU of the proxy per list, ms", "time, ms")
		for _, kind := range all {
			cpu := "-"
			if kind != direct {
				cpu = estimateOf(each(r.lists[kind], func(s sample) float64 { return s.perRequest() / 1e3 })).show(1)
			}
			row(kind, cpu, estimateOf(each(r.lists[kind], ms(func(s sample) time.Duration { return s.p50 }))).show(1))
		}
		fmt.Fprintln(w)
	}
	if len(r.watches) > 0 {
		row := table("1,000 idle watches of one client", "through", "memory per watch, kB", "stacks of goroutines per watch, kB", "goroutines per watch", "connections from the client", "connections to the API server")
		for _, kind := range []string{bare, plugin, official} {
			watches := r.watches[kind]
			row(kind, estimateOf(each(watches, memory)).show(1),
				estimateOf(each(watches, func(w watched) float64 { return w.stacks / 1e3 })).show(1),
				estimateOf(each(watches, func(w watched) float64 { return w.goroutines })).show(1),
				estimateOf(each(watches, func(w watched) float64 { return float64(w.down) })).show(0),
				estimateOf(each(watches, func(w watched) float64 { return float64(w.up) })).show(0))
		}
		fmt.Fprintln(w)
	}
	if len(r.streams) > 0 {
		row := table("50 MB through a session", "through", "`kubectl exec -i -- cat`, MB/s there and back", "`kubectl cp`, MB/s")
		for _, kind := range all {
			row(kind, estimateOf(r.streams["exec "+kind]).show(1), estimateOf(r.streams["cp "+kind]).show(1))
		}
		fmt.Fprintln(w)
	}
	if len(r.peers) > 0 {
		row := table("A small answer on tailnets of increasing size (16 callers)", "peers, with a grant each", "CPU of the bare proxy per request, us", "CPU of the plugin, us",
			"in turn with Tailscale's proxy, us", "CPU of Tailscale's proxy per request, us")
		for _, n := range peerCounts {
			row(fmt.Sprint(n), estimateOf(cpus(r.growth[on(bare, n)])).show(0), estimateOf(cpus(r.growth[on(plugin, n)])).show(0),
				estimateOf(cpus(r.peers[n][plugin])).show(0), estimateOf(cpus(r.peers[n][official])).show(0))
		}
		fmt.Fprintln(w)
	}
	if len(r.handler) > 0 {
		row := table("The handler alone (Go benchmark)", "caller", "ns", "bytes", "allocations")
		for _, name := range []string{"hit", "miss"} {
			title := map[string]string{"hit": "in the cache (hit)", "miss": "looked up (miss)"}[name]
			row(title, estimateOf(r.handler[name+" ns"]).show(0), estimateOf(r.handler[name+" B"]).show(0), estimateOf(r.handler[name+" allocs"]).show(0))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprint(w, "### Targets\n\n")
	for _, g := range r.goals() {
		v, how := g.judge(len(r.o.looks()))
		fmt.Fprintf(w, "- **%s**: %s. Measured: %s\n", v, g.what, how)
		if v != met && g.reason != nil {
			fmt.Fprintf(w, "  Reason: %s\n", g.reason())
		}
	}
}

// all are the proxies, and what is without any.
var all = []string{bare, plugin, official, direct}

func memory(w watched) float64 { return w.memory / 1e3 }

// decided reports whether all goals of a measurement are.
func (r *report) decided(of string) bool { return decided(r.goals(), of, len(r.o.looks())) }

// goals are the goals of what has been measured.
func (r *report) goals() (goals []goal) {
	perRequest := func(samples map[string][]sample, a, b string) func() []float64 {
		return func() []float64 { return pairs(cpus(samples[a]), cpus(samples[b])) }
	}
	half := ms(func(s sample) time.Duration { return s.p50 })
	for _, on := range []connection{newTLS, newPlain} {
		for _, callers := range concurrencies {
			key := loadKey{on, callers}
			samples := r.loads[key]
			if len(samples) == 0 {
				continue
			}
			goals = append(goals, goal{
				of: key.String(), what: fmt.Sprintf("%v: CPU per request at most 1.10 times that of the bare proxy", key),
				bound: atMost(1.10), values: perRequest(samples, plugin, bare), unit: " times", decimals: 3,
			}, goal{
				of: key.String(), what: fmt.Sprintf("%v: p50 at most 1.05 times that of the bare proxy", key),
				bound: atMost(1.05), values: func() []float64 { return pairs(each(samples[plugin], half), each(samples[bare], half)) }, unit: " times", decimals: 3,
			})
			if callers == 16 && len(samples[official]) > 0 {
				goals = append(goals, goal{
					of: key.String(), what: fmt.Sprintf("%v: at least 3 times the requests per CPU-second of Tailscale's proxy", key),
					bound: atLeast(3), values: perRequest(samples, official, plugin), unit: " times", decimals: 2,
					reason: r.shareOfStack(key),
				})
			}
		}
	}
	if len(r.kubectl) > 0 {
		goals = append(goals, goal{
			of: "kubectl", what: "kubectl get: CPU per command at most 1.10 times that of the bare proxy",
			bound: atMost(1.10), values: perRequest(r.kubectl, plugin, bare), unit: " times", decimals: 3,
		}, goal{
			of: "kubectl", what: "kubectl get: p50 at most 1.05 times that of the bare proxy",
			bound: atMost(1.05), values: func() []float64 { return pairs(each(r.kubectl[plugin], half), each(r.kubectl[bare], half)) }, unit: " times", decimals: 3,
		})
	}
	for _, callers := range []int{16, 64} {
		key := loadKey{kept, callers}
		if samples := r.loads[key]; len(samples) > 0 {
			goals = append(goals, goal{
				of: key.String(), what: fmt.Sprintf("%v: CPU per request at most 1.02 times that of the bare proxy", key),
				bound: atMost(1.02), values: perRequest(samples, plugin, bare), unit: " times", decimals: 3,
			})
		}
	}
	for _, t := range []struct {
		callers int
		least   float64
	}{{16, 4}, {1, 1.5}} {
		key := loadKey{kept, t.callers}
		if samples := r.loads[key]; len(samples) > 0 {
			goals = append(goals, goal{
				of: key.String(), what: fmt.Sprintf("%v: at least %g times the requests per CPU-second of Tailscale's proxy", key, t.least),
				bound: atLeast(t.least), values: perRequest(samples, official, plugin), unit: " times", decimals: 2,
				reason: r.shareOfStack(key),
			})
		}
	}
	if len(r.watches) > 0 {
		mine, bareProxy := each(r.watches[plugin], memory), each(r.watches[bare], memory)
		reason := func() string {
			stacks := estimateOf(each(r.watches[plugin], func(w watched) float64 { return w.stacks / 1e3 }))
			// Depths are from a traceback with GOTRACEBACK=system, which names the
			// frames' addresses.
			return fmt.Sprintf("%s kB of it are stacks of goroutines, and the bare proxy takes %s kB. Go halves a stack when less than a quarter of it is used. "+
				"With Caddy 2.11.9, a watch over HTTP/2 waits for its next event 15,480 bytes deep in the bare proxy, of which the frames of reverse_proxy are 9,920, and "+
				"16,592 bytes deep in the plugin, whose own frames are 976: 32 kB in both, and Caddy's frames alone keep it from 16. The plugin adds copies of "+
				"the request (for its context, and for the headers that only the transport may see).", stacks.show(1), estimateOf(bareProxy).show(1))
		}
		goals = append(goals, goal{
			of: "watch", what: "an idle watch costs at most 30 kB",
			bound: atMost(30), values: func() []float64 { return mine }, unit: " kB", decimals: 1, reason: reason,
		}, goal{
			of: "watch", what: "an idle watch costs at most what it costs the bare proxy",
			bound: atMost(1), values: func() []float64 { return pairs(mine, bareProxy) }, unit: " times", decimals: 3, reason: reason,
		}, goal{
			of: "watch", what: "an idle watch costs less than with Tailscale's proxy",
			bound: atMost(1), values: func() []float64 { return pairs(mine, each(r.watches[official], memory)) }, unit: " times", decimals: 3,
		})
	}
	if len(r.growth) > 0 {
		grows := func(kind string) func() []float64 {
			return perRequest(r.growth, on(kind, peerCounts[len(peerCounts)-1]), on(kind, peerCounts[0]))
		}
		goals = append(goals, goal{
			of: "peers", what: "CPU per request flat (5 %) from 10 to 10,000 peers",
			bound: atMost(1.05), values: grows(plugin), unit: " times", decimals: 3,
			reason: func() string {
				return fmt.Sprintf("the bare proxy, which does not identify callers, takes %s times on the same tailnets.", estimateOf(grows(bare)()).show(3))
			},
		})
	}
	if len(r.handler) > 0 {
		reason := func() string {
			return "according to a CPU profile of this benchmark, checking the client's headers, finding the cached decision, " +
				"and writing and removing our headers take a fifth each; tracking the open request, setting placeholders and " +
				"copying the request that carries the identity take the rest."
		}
		goals = append(goals, goal{
			of: "handler", what: "a hit in the handler takes at most 1 us",
			bound: atMost(1000), values: func() []float64 { return r.handler["hit ns"] }, unit: " ns", reason: reason,
		}, goal{
			of: "handler", what: "a hit in the handler makes at most 6 allocations",
			bound: atMost(6), values: func() []float64 { return r.handler["hit allocs"] }, unit: "", reason: reason,
		})
	}
	return goals
}

// shareOfStack explains how far the plugin can be from Tailscale's proxy.
func (r *report) shareOfStack(key loadKey) func() string {
	return func() string {
		most := ratio(cpus(r.loads[key][official]), cpus(r.loads[key][bare]))
		return fmt.Sprintf("the bare proxy, without the plugin, reaches %s times; WireGuard and the network stack take the same time in all three.", most.show(2))
	}
}

// write writes performance.md and its picture.
func (r *report) write(docs string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, performance, time.Now().UTC().Format(time.DateOnly), machine(), versions(), r.o.rounds, r.o.slice, r.o.most, watchRounds, streamRounds, lab.DialAttempt)
	r.print(&b)
	if err := os.MkdirAll(docs, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(docs, "performance.svg"), r.picture(), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(docs, "performance.md"), b.Bytes(), 0o644)
}

const performance = `# Performance

<!-- Written by make bench. -->

What a request costs on its way through the plugin, compared with the alternatives. All figures come from one run of ` + "`make bench`" + `:

- Date: %s
- Machine: %s
- Versions: %s

![CPU time of the proxy per request](performance.svg)

How it is measured: real nodes on a real tailnet (including WireGuard), each proxy in a process of its own, the client and the
upstream in others, all in a network namespace without other traffic. A real API server answers lists, watches and sessions.
Small answers come from a server that holds them in memory: the API server takes more CPU time for each of them than any
proxy does, and would take that time from the proxies on the same processors. CPU time is what the operating
system has counted for the proxy's process alone. Each comparison takes %d rounds of %v for each proxy, in turn, and up to %d
while one of its targets is undecided; each round begins with another proxy. Watches take %d rounds, with a new process each, and sessions %d.
Figures are medians with their 95 %% interval in parentheses (order statistics).

A target is met if the whole interval is within it, missed if none of the interval is, and undecided otherwise. Proxies are compared
round by round, since the machine may be slower in one round than in another. Targets are judged each time when there are twice as many rounds; their
intervals are wide enough that all these times together err in 5 %% of the cases.

A new connection is what each kubectl command opens, and what the client closes when it has the answer. "Dialled again" are requests
that were refused a connection, or found none within %v, as tsnet does not accept one from a client's port that it has seen a short
while ago. The lab then dials again from another port. Those that waited count for the CPU time, and not for p50 and p99.

Each proxy is deployed as its users do: the plugin as ` + "`tailscale_kubernetes`" + ` with its defaults; bare ` + "`reverse_proxy`" + ` on the same kind of listener,
with a service account's token and no impersonation; Tailscale's proxy as its ` + "`k8s-proxy`" + ` runs it, behind the node's serve config and the
PROXY protocol. Small answers, lists and sessions go through all of them over plain HTTP inside the tailnet, since the lab has no authority
that would issue a certificate to Tailscale's proxy. New connections are measured over TLS as well, without it. kubectl and watches go over HTTP/2 and TLS where the proxy offers them, as clients do; Tailscale's proxy
offers only HTTP/1.1. Tailscale's control server for tests makes up the peers of the larger tailnets.

`

// machine describes the machine.
func machine() string {
	model := "unknown CPU"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("%d x %s, %s/%s", runtime.NumCPU(), model, runtime.GOOS, runtime.GOARCH)
}

// versions lists the versions of what was measured.
func versions() string {
	wanted := map[string]string{
		"github.com/caddyserver/caddy/v2": "Caddy", "tailscale.com": "Tailscale", "k8s.io/client-go": "client-go",
	}
	out := []string{runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if name := wanted[m.Path]; name != "" {
				out = append(out, name+" "+m.Version)
			}
		}
	}
	return strings.Join(out, ", ")
}
