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
)

var (
	concurrencies = []int{1, 16, 64}
	peerCounts    = []int{10, 1_000, 10_000}
)

const (
	watchRounds  = 3
	streamRounds = 10
	streamSize   = 50_000_000
)

// report holds all measurements.
type report struct {
	o       options
	handler map[string][]float64        // by case and unit
	gets    map[int]map[string][]sample // by callers and proxy
	lists   map[string][]sample         // by proxy
	watches map[string][]watched        // by proxy
	streams map[string][]float64        // MB/s, by command and proxy
	peers   map[int]map[string][]sample // by peers and proxy
	growth  map[string][]sample         // of the plugin and the bare proxy, by proxy and peers
}

func newReport(o options) *report {
	return &report{
		o:       o,
		handler: make(map[string][]float64),
		gets:    make(map[int]map[string][]sample),
		watches: make(map[string][]watched),
		streams: make(map[string][]float64),
		peers:   make(map[int]map[string][]sample),
	}
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
	if len(r.gets) > 0 {
		row := table("A small answer (2 KB)", "callers", "through", "CPU of the proxy per request, us", "requests per CPU-second", "p50, ms", "p99, ms")
		for _, callers := range concurrencies {
			for _, kind := range []string{bare, plugin, official, direct} {
				samples := r.gets[callers][kind]
				cpu, perSecond := "-", "-"
				if kind != direct {
					e := estimateOf(cpus(samples))
					cpu, perSecond = e.show(0), fmt.Sprintf("%.0f", 1e6/e.median)
				}
				row(fmt.Sprint(callers), kind, cpu, perSecond,
					estimateOf(each(samples, ms(func(s sample) time.Duration { return s.p50 }))).show(1),
					estimateOf(each(samples, ms(func(s sample) time.Duration { return s.p99 }))).show(1))
			}
		}
		fmt.Fprintln(w)
	}
	if len(r.lists) > 0 {
		row := table("A list of 5 MB", "through", "CPU of the proxy per list, ms", "time, ms")
		for _, kind := range []string{bare, plugin, official, direct} {
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
		for _, kind := range []string{bare, plugin, official, direct} {
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
	for _, t := range r.targets() {
		verdict := "missed"
		if t.met {
			verdict = "met"
		}
		fmt.Fprintf(w, "- **%s**: %s. Measured: %s\n", verdict, t.what, t.measured)
		if !t.met && t.left != "" {
			fmt.Fprintf(w, "  Reason: %s\n", t.left)
		}
	}
}

func memory(w watched) float64 { return w.memory / 1e3 }

// goal is a target and whether it was reached.
type goal struct {
	what, measured string
	met            bool
	left           string // why a missed goal was missed
}

// targets compares the measurements with the goals.
func (r *report) targets() (goals []goal) {
	add := func(met bool, left, what, measured string, args ...any) {
		goals = append(goals, goal{what, fmt.Sprintf(measured, args...), met, left})
	}
	if len(r.gets) > 0 {
		for _, callers := range []int{16, 64} {
			e := ratio(cpus(r.gets[callers][plugin]), cpus(r.gets[callers][bare]))
			add(e.low <= 1.02, "", fmt.Sprintf("at %d callers, CPU per request within 2 %% of the bare proxy (the interval's low end at most 1.02)", callers), "%s times the bare proxy's", e.show(3))
		}
		for _, t := range []struct {
			n       int
			callers string
			least   float64
		}{{16, "at 16 callers", 4}, {1, "with one caller", 1.5}} {
			e := ratio(cpus(r.gets[t.n][official]), cpus(r.gets[t.n][plugin]))
			most := ratio(cpus(r.gets[t.n][official]), cpus(r.gets[t.n][bare]))
			left := fmt.Sprintf("the bare proxy, without the plugin, reaches %s times; WireGuard and the network stack take the same time in all three.", most.show(2))
			add(e.median >= t.least, left, fmt.Sprintf("%s, at least %g times the requests per CPU-second of Tailscale's proxy", t.callers, t.least), "%s times", e.show(2))
		}
	}
	if len(r.watches) > 0 {
		mine, theirs := estimateOf(each(r.watches[plugin], memory)), estimateOf(each(r.watches[official], memory))
		bareProxy := estimateOf(each(r.watches[bare], memory))
		stacks := estimateOf(each(r.watches[plugin], func(w watched) float64 { return w.stacks / 1e3 }))
		left := fmt.Sprintf("%s kB of it are stacks of goroutines, and the bare proxy takes %s kB. Go halves a stack when less than a quarter of it is used, and a watch "+
			"waits for its next event inside all of Caddy's handlers, which is too deep for that. The plugin adds copies of "+
			"the request (for its context, and for the headers that only the transport may see) and a page of stack.", stacks.show(1), bareProxy.show(1))
		add(mine.median <= 25 && mine.median < theirs.median, left, "an idle watch costs at most 25 kB, and less than with Tailscale's proxy", "%s kB; Tailscale's: %s kB", mine.show(1), theirs.show(1))
	}
	if len(r.peers) > 0 {
		grows := func(kind string) estimate {
			return ratio(cpus(r.growth[on(kind, peerCounts[len(peerCounts)-1])]), cpus(r.growth[on(kind, peerCounts[0])]))
		}
		e, bareProxy := grows(plugin), grows(bare)
		left := fmt.Sprintf("the bare proxy, which does not identify callers, takes %s times on the same tailnets.", bareProxy.show(3))
		add(e.median <= 1.05, left, "CPU per request flat (5 %) from 10 to 10,000 peers", "%s times", e.show(3))
	}
	if len(r.handler) > 0 {
		ns, allocs := estimateOf(r.handler["hit ns"]), estimateOf(r.handler["hit allocs"])
		const left = "according to a CPU profile of this benchmark, checking the client's headers, finding the cached decision, " +
			"and writing and removing our headers take a fifth each; tracking the open request, setting placeholders and " +
			"copying the request that carries the identity take the rest."
		add(ns.median < 1000 && allocs.median <= 6, left, "a hit in the handler under 1 us and at most 6 allocations", "%s ns, %.0f allocations", ns.show(0), allocs.median)
	}
	return goals
}

// write writes performance.md and its picture.
func (r *report) write(docs string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, performance, time.Now().UTC().Format(time.DateOnly), machine(), versions(), r.o.rounds, r.o.slice, watchRounds, streamRounds)
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
system has counted for the proxy's process alone. Each comparison takes %d rounds of %v for each proxy, in turn; each
round begins with another proxy. Watches take %d rounds, with a new process each, and sessions %d. Figures are medians with their 95 %% interval in
parentheses (order statistics; with three rounds, lowest and highest).

Each proxy is deployed as its users do: the plugin as ` + "`tailscale_kubernetes`" + ` with its defaults; bare ` + "`reverse_proxy`" + ` on the same kind of listener,
with a service account's token and no impersonation; Tailscale's proxy as its ` + "`k8s-proxy`" + ` runs it, behind the node's serve config and the
PROXY protocol. Small answers, lists and sessions go through all of them over plain HTTP inside the tailnet, since the lab has no authority
that would issue a certificate to Tailscale's proxy. Watches go over HTTP/2 and TLS where the proxy offers them, as clients do; Tailscale's proxy
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
