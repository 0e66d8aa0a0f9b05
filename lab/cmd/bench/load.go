// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// target is a server to which requests are sent.
type target struct {
	kind  string
	proxy *proxy // nil if there is none
	base  string
	token string // empty if the proxy has the credentials
	// transport returns a new transport, which has no connection yet.
	transport func() *http.Transport
	// refused counts the connections that were refused, and dialled again.
	refused *atomic.Int64
	// client keeps its connections. If it is nil, each request opens one of its own.
	client *http.Client
}

// dials is how often to dial a proxy that refuses a connection, as its network stack does
// if it has not forgotten an earlier one from the same port.
const dials = 5

// through returns the target behind a proxy, over plain HTTP.
func through(p *proxy, from *tsnet.Server) target {
	refused := new(atomic.Int64)
	return target{kind: p.kind, proxy: p, base: "http://" + p.Address, refused: refused, transport: func() *http.Transport {
		return &http.Transport{
			DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
				for range dials {
					// The error of tsnet's network stack is a text.
					if conn, err = lab.Dial(ctx, from, network, address); err == nil || !strings.Contains(err.Error(), "refused") {
						break
					}
					refused.Add(1)
				}
				return conn, err
			},
			MaxIdleConnsPerHost: 1000,
			DisableCompression:  true,
		}
	}}
}

// overTLS returns the target behind a proxy over TLS 1.3 and HTTP/2, as kubectl uses it.
func overTLS(p *proxy, from *tsnet.Server) target {
	t := through(p, from)
	plain := t.transport
	t.base = "https://" + p.Address
	t.transport = func() *http.Transport {
		transport := plain()
		transport.TLSClientConfig = &tls.Config{
			ServerName:         nodeNames[p.kind] + "." + lab.Domain,
			InsecureSkipVerify: true, // WireGuard authenticates the server
			MinVersion:         tls.VersionTLS13,
		}
		transport.ForceAttemptHTTP2 = true
		return transport
	}
	return t
}

// without returns the API server itself as a target.
func without(u *upstream) (target, error) {
	config, err := rest.TLSConfigFor(u.rest())
	return target{kind: direct, base: u.Host, token: u.Token, transport: func() *http.Transport {
		return &http.Transport{TLSClientConfig: config.Clone(), ForceAttemptHTTP2: true, DisableCompression: true}
	}}, err
}

// keepAlive returns t with a client that keeps its connections.
func (t target) keepAlive() target {
	t.client = &http.Client{Transport: t.transport()}
	return t
}

// sample is one round's measurement of a proxy.
type sample struct {
	requests int
	cpu      time.Duration // of the proxy's process
	p50, p99 time.Duration
	// redialled is how many requests found no connection at the first attempt: it was
	// refused, or took seconds, which are the lab's and not in p50 and p99 (see lab.Dial).
	redialled int
}

// perRequest returns the CPU time of a request in microseconds.
func (s sample) perRequest() float64 {
	return float64(s.cpu.Nanoseconds()) / 1e3 / float64(s.requests)
}

// load requests path with several concurrent callers for a while. Each sends its
// next request when the previous one is answered.
func (t target) load(ctx context.Context, path string, callers int, d time.Duration) (s sample, err error) {
	until := time.Now().Add(d)
	return t.measure(func(took *latencies) error {
		var asking sync.WaitGroup
		var failed error
		var mu sync.Mutex
		for range callers {
			asking.Go(func() {
				var mine []time.Duration
				var err error
				for err == nil && time.Now().Before(until) {
					began := time.Now()
					err = t.get(ctx, path)
					mine = append(mine, time.Since(began))
				}
				mu.Lock()
				defer mu.Unlock()
				*took = append(*took, mine...)
				if err != nil {
					failed = err
				}
			})
		}
		asking.Wait()
		return failed
	})
}

type latencies []time.Duration

// measure measures what f does.
func (t target) measure(f func(*latencies) error) (s sample, err error) {
	var before, after time.Duration
	if t.proxy != nil {
		if before, err = t.proxy.cpu(); err != nil {
			return sample{}, err
		}
	}
	refused := t.refusals()
	var took latencies
	if err := f(&took); err != nil {
		return sample{}, fmt.Errorf("%s: %w", t.kind, err)
	}
	if t.proxy != nil {
		if after, err = t.proxy.cpu(); err != nil {
			return sample{}, err
		}
	}
	s = sample{requests: len(took), cpu: after - before}
	took = slices.DeleteFunc(took, func(d time.Duration) bool { return d >= lab.DialAttempt })
	s.redialled = s.requests - len(took) + int(t.refusals()-refused)
	if len(took) == 0 {
		return sample{}, fmt.Errorf("%s: no request was answered within %v", t.kind, lab.DialAttempt)
	}
	slices.Sort(took)
	s.p50, s.p99 = took[len(took)/2], took[len(took)*99/100]
	return s, nil
}

// refusals returns how many connections have been refused.
func (t target) refusals() int64 {
	if t.refused == nil {
		return 0
	}
	return t.refused.Load()
}

// get requests path once and reads the answer.
func (t target) get(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.base+path, nil)
	if err != nil {
		return err
	}
	if t.token != "" {
		req.Header.Set("Authorization", "Bearer "+t.token)
	}
	client := t.client
	if client == nil {
		transport := t.transport()
		client = &http.Client{Transport: transport}
		// As a kubectl that exits does, the client closes the connection.
		defer transport.CloseIdleConnections()
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return nil
}

// comparison measures targets in turn.
type comparison struct {
	targets []target
	measure func(t target, warmUp bool) (sample, error)
	// samples gets what was measured in each round, by kind.
	samples map[string][]sample
	// decided reports whether there are enough rounds.
	decided func() bool
}

// compare measures all targets of c in each round, after a short warm-up. Each round
// begins with another target. There are more rounds until c is decided, up to a maximum.
func (b *bench) compare(c comparison) error {
	for _, t := range c.targets {
		if _, err := c.measure(t, true); err != nil {
			return err
		}
	}
	round := 0
	for _, until := range b.looks() {
		for ; round < until; round++ {
			for i := range c.targets {
				t := c.targets[(round+i)%len(c.targets)]
				s, err := c.measure(t, false)
				if err != nil {
					return err
				}
				c.samples[t.kind] = append(c.samples[t.kind], s)
			}
		}
		if c.decided() {
			break
		}
	}
	return nil
}
