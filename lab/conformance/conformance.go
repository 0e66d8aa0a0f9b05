// SPDX-License-Identifier: Apache-2.0

// Package conformance attacks a proxy that impersonates its callers to a Kubernetes
// API server, and judges it by what the API server would have seen.
//
// It tries each way in which such proxies have failed in many spellings, over
// HTTP/1.1 and HTTP/2. It sends raw bytes and frames, as HTTP clients refuse to send
// malformed requests. A [Recorder] takes the place of the API server. Each attack
// may end in two ways: the recorder sees exactly the caller's identity, or it sees
// nothing.
package conformance

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Identity is the identity that the recorder has to see.
type Identity struct {
	User   string
	Groups []string
}

// Proxy is a proxy under attack, reached in one way.
type Proxy struct {
	// Name names it in messages.
	Name string
	// Address is its host:port, and Host the host name in requests.
	Address, Host string
	// TLS selects TLS, which HTTP/2 needs here. Certificates are not checked.
	TLS bool
	// Dial connects to it as the caller.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Packets returns a UDP socket of the caller for HTTP/3, and the proxy's address
	// as seen from there. If nil, HTTP/3 is not tried.
	Packets func(ctx context.Context) (net.PacketConn, net.Addr, error)
	// Want is the caller's identity, and From its address in the API server's audit
	// log. If From is empty, the address is not checked.
	Want Identity
	From string
	// Nobody says that requests made in this way have no caller: none may arrive.
	Nobody bool
	// Pitfall is the ID of the pitfall that this way of reaching the proxy is about,
	// whatever the attack. Default: the attack's.
	Pitfall string
	// Authorization is the proxy's own credential, empty if it has none.
	Authorization string
	// Seen receives the proxy's requests.
	Seen *Recorder
}

// protocol is an HTTP version.
type protocol string

const (
	http1 protocol = "HTTP/1.1"
	http2 protocol = "HTTP/2"
	http3 protocol = "HTTP/3"
)

// protocols returns the protocols over which p can be attacked.
func (p Proxy) protocols() []protocol {
	protocols := []protocol{http1}
	if p.TLS {
		protocols = append(protocols, http2)
	}
	if p.Packets != nil {
		protocols = append(protocols, http3)
	}
	return protocols
}

// field is a header field, sent exactly as written.
type field struct{ name, value string }

// attack is a request that tries something. In raw parts, %s stands for the path and
// %h for the proxy's name.
type attack struct {
	pitfall string  // ID
	method  string  // default: GET
	path    string  // follows the marker; default: empty
	target  string  // the request target; default: the path
	host    *string // default: the proxy's name
	preface string  // raw, sent before the request
	fields  []field
	body    string // raw, sent after the header
	trailer bool   // whether body is chunked and ends with trailers
	behind  string // raw, a second request sent at once
	// trailers are sent over HTTP/2.
	trailers []field
	// refused says that the request may not arrive, even with the right identity,
	// and refusedPlain that it may not over plain HTTP.
	refused, refusedPlain bool
	// arrives describes further faults of a request that arrived. May be nil.
	arrives func(*http.Request) string
	// answer is how long the answer may be, in bytes; 0: any.
	answer int64
	// only is the only protocol that can express the attack; empty: HTTP/1.1 and 2.
	only protocol
}

// in reports whether a protocol can express the attack.
func (a attack) in(proto protocol) bool {
	if a.only == "" {
		return proto != http3
	}
	return a.only == proto
}

// Failure is an attack that succeeded.
type Failure struct {
	Pitfall, Protocol, Reason string
	// Attack is the number of the attack, for [Options].Only.
	Attack int
	// Request is the request: a shell command that prints its bytes for HTTP/1.1, or
	// its fields for HTTP/2 and HTTP/3.
	Request string
}

// Result counts the outcomes of attacks of one pitfall over one protocol.
type Result struct {
	Pitfall, Protocol    string
	Tried, Passed, Ended int // Ended: nothing arrived at the recorder
	Failures             []Failure
}

// Options restrict a run.
type Options struct {
	// Only is the number of the only attack to make. Default: all.
	Only int
	// First ends the run at the first failure.
	First bool
}

// timeout is how long a proxy may take to answer a request.
const timeout = 10 * time.Second

// Run makes all attacks and returns their outcomes by pitfall and protocol. It first
// sends honest requests. It returns an error if one does not get through, or, where
// none may, if one is not answered: the attacks would then prove nothing. If an
// honest request arrives with another identity, that is a failure, and the only one
// returned.
func Run(ctx context.Context, p Proxy, options Options) ([]Result, error) {
	results, err := p.probe(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name, err)
	}
	if len(results) > 0 {
		return results, nil
	}
	var failures int
	tried := make(map[string]tryOf)
	fail := func(try tryOf, reason string) {
		failures++
		r := &results[try.result]
		r.Failures = append(r.Failures, Failure{r.Pitfall, r.Protocol, reason, try.number, try.attack.show(p, try.proto)})
	}
	for i, a := range attacks() {
		if options.Only != 0 && options.Only != i+1 {
			continue
		}
		for _, proto := range p.protocols() {
			if !a.in(proto) {
				continue
			}
			try := tryOf{a, i + 1, proto, resultOf(&results, cmp.Or(p.Pitfall, a.pitfall), proto)}
			marker := p.Seen.marker()
			tried[marker] = try
			reason, arrived, _ := p.try(ctx, marker, proto, a)
			r := &results[try.result]
			r.Tried++
			switch {
			case reason != "":
				fail(try, reason)
			case arrived:
				r.Passed++
			default:
				r.Ended++
			}
			if err := ctx.Err(); err != nil {
				return results, err
			}
			if options.First && failures > 0 {
				return results, nil
			}
		}
	}
	// A proxy that has closed the connection may still have sent a request upstream.
	for marker, requests := range p.Seen.takeAll() {
		for _, r := range requests {
			late, ok := tried[marker]
			if !ok {
				continue
			}
			if reason := p.verdict(late.attack, r); reason != "" {
				fail(late, reason)
			}
		}
	}
	return results, nil
}

// tryOf says which attack used a marker.
type tryOf struct {
	attack attack
	number int
	proto  protocol
	result int
}

// resultOf returns the index of the result of a pitfall and protocol. It adds the
// result if necessary.
func resultOf(results *[]Result, pitfall string, proto protocol) int {
	i := slices.IndexFunc(*results, func(r Result) bool { return r.Pitfall == pitfall && r.Protocol == string(proto) })
	if i < 0 {
		i = len(*results)
		*results = append(*results, Result{Pitfall: pitfall, Protocol: string(proto)})
	}
	return i
}

// probe makes honest requests. It returns an error if one does not end as it has to,
// and a failure if one arrives with another identity.
func (p Proxy) probe(ctx context.Context) ([]Result, error) {
	for _, proto := range p.protocols() {
		for _, honest := range []attack{{}, {method: "POST", body: "{}"}} {
			reason, arrived, err := p.try(ctx, p.Seen.marker(), proto, honest)
			switch {
			case reason != "":
				failure := Failure{Pitfall: honestID, Protocol: string(proto), Reason: reason, Request: honest.show(p, proto)}
				return []Result{{Pitfall: honestID, Protocol: string(proto), Tried: 1, Failures: []Failure{failure}}}, nil
			case p.Nobody || proto == http3:
				// The request has to be refused. No answer is not a refusal.
				if err != nil {
					return nil, fmt.Errorf("a request is not answered over %s: %w", proto, err)
				}
			case !arrived:
				return nil, fmt.Errorf("an honest request does not get through over %s (%w)", proto, err)
			}
		}
	}
	return nil, nil
}

// verdict says what is wrong with an attack's request that arrived.
func (p Proxy) verdict(a attack, r *http.Request) string {
	if p.Nobody || a.refused || (a.refusedPlain && !p.TLS) {
		return fmt.Sprintf("it arrived, as user %q; it must not arrive at all", r.Header["Impersonate-User"])
	}
	if reason := p.judge(r); reason != "" || a.arrives == nil {
		return reason
	}
	return a.arrives(r)
}

// try sends an attack, says what is wrong with the request that arrived (empty if
// nothing is), and reports whether any arrived. An error means that there was no
// answer: the connection was closed or reset, or the answer was malformed.
func (p Proxy) try(ctx context.Context, marker string, proto protocol, a attack) (reason string, arrived bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var answer int64
	switch proto {
	case http1:
		answer, err = p.sendHTTP1(ctx, a, marker)
	case http2:
		answer, err = p.sendHTTP2(ctx, a, marker)
	case http3:
		err = p.sendHTTP3(ctx, a, marker)
	}
	for _, r := range p.Seen.take(marker) {
		arrived = true
		if reason := p.verdict(a, r); reason != "" {
			return reason, true, err
		}
	}
	if a.answer > 0 && answer > a.answer {
		return fmt.Sprintf("it is answered with %d bytes or more; want at most %d", answer, a.answer), arrived, err
	}
	return "", arrived, err
}

// judge says what is wrong with a request that arrived.
func (p Proxy) judge(r *http.Request) string {
	var users, groups []string
	for name, values := range r.Header {
		folded := fold(name)
		switch {
		case folded == "impersonate-user":
			users = append(users, values...)
		case folded == "impersonate-group":
			groups = append(groups, values...)
		case strings.HasPrefix(folded, "impersonate"), strings.HasPrefix(folded, "x-remote-"):
			return fmt.Sprintf("%s: %q arrived", name, values)
		case folded == "authorization":
			if len(values) != 1 || p.Authorization == "" || values[0] != p.Authorization {
				return fmt.Sprintf("%s: %q arrived, which is not the proxy's own", name, values)
			}
		case folded == "sec-websocket-protocol":
			if strings.Contains(fold(strings.Join(values, ",")), "bearer-authorization") {
				return fmt.Sprintf("%s: %q arrived", name, values)
			}
		case folded == "x-forwarded-for":
			if p.From != "" && !slices.Equal(values, []string{p.From}) {
				return fmt.Sprintf("%s: %q arrived; the audit log must name %s", name, values, p.From)
			}
		}
		for _, canary := range canaries {
			if strings.Contains(strings.Join(values, ","), canary) {
				return fmt.Sprintf("%s: %q arrived, which the client forged", name, values)
			}
		}
	}
	if !slices.Equal(users, []string{p.Want.User}) {
		return fmt.Sprintf("user %q arrived; want %q", users, p.Want.User)
	}
	if !slices.Equal(groups, p.Want.Groups) {
		return fmt.Sprintf("groups %q arrived; want %q", groups, p.Want.Groups)
	}
	if p.Authorization != "" && r.Header.Get("Authorization") == "" {
		return "the identity arrived without the proxy's credential"
	}
	for name := range r.Trailer {
		if strings.HasPrefix(fold(name), "impersonate") || fold(name) == "authorization" {
			return fmt.Sprintf("the trailer %s arrived", name)
		}
	}
	return ""
}

// canaries are parts of forged values. They must not arrive in any header.
var canaries = []string{forged, "stolen", "c3RvbGVu"}

// fold returns a header name in the form that lenient parsers reduce it to.
func fold(name string) string {
	return strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
}
