// SPDX-License-Identifier: Apache-2.0

// Package conformance attacks a proxy that impersonates its callers to a
// Kubernetes API server, and judges it by what the API server would have seen.
//
// It knows the ways in which such proxies have gone wrong, tries each in many
// spellings, over HTTP/1.1 and HTTP/2, as raw bytes and frames: HTTP clients do not
// send what they know to be forged. A [Recorder] takes the place of the API server.
// Whatever is sent, there are two ways for it to end: the recorder sees exactly the
// caller's identity, or it sees nothing.
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

// Identity is who the recorder has to see.
type Identity struct {
	User   string
	Groups []string
}

// Proxy is a proxy under attack, by one way to it.
type Proxy struct {
	// Name is what messages call it.
	Name string
	// Address is its host:port, and Host the name that requests give it.
	Address, Host string
	// TLS says that it is to be spoken to over TLS, which is what HTTP/2 needs
	// here. Certificates are not checked.
	TLS bool
	// Dial connects to it as the caller.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Packets returns a socket of the caller's for HTTP/3 and the proxy's address
	// as seen from there. If nil, HTTP/3 is not tried.
	Packets func(ctx context.Context) (net.PacketConn, net.Addr, error)
	// Want is the caller's identity, and From its address as the API server's
	// audit log has to name it, empty if that is not to be judged.
	Want Identity
	From string
	// Nobody says that whoever comes this way is no caller: nothing may arrive.
	Nobody bool
	// Pitfall is the ID of the one that this way stands for, whatever is sent over
	// it. Default: the attack's.
	Pitfall string
	// Authorization is the proxy's own credential, empty if it has none.
	Authorization string
	// Seen is where its requests arrive.
	Seen *Recorder
}

// protocol is how a request travels.
type protocol string

const (
	http1 protocol = "HTTP/1.1"
	http2 protocol = "HTTP/2"
	http3 protocol = "HTTP/3"
)

// protocols are those in which p can be attacked.
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

// field is a header field as it is sent: nothing is corrected.
type field struct{ name, value string }

// attack is a request that tries something. In what is sent raw, %s stands for the
// path and %h for the proxy's name.
type attack struct {
	pitfall string  // ID
	method  string  // default: GET
	path    string  // what is asked for, behind the marker; default: nothing
	target  string  // the request target; default: the path
	host    *string // default: the proxy's name
	preface string  // raw, ahead of the request
	fields  []field
	body    string // raw, behind the header
	trailer bool   // whether body is chunked and ends with trailers
	behind  string // raw, a further request in the same breath
	// trailers are those of HTTP/2.
	trailers []field
	// refused says that nothing may arrive, whatever identity it has, and
	// refusedPlain that it may not over plain HTTP.
	refused, refusedPlain bool
	// arrives says what else is wrong about what arrived; nil for nothing.
	arrives func(*http.Request) string
	// only is the one protocol in which it can be expressed; empty for 1.1 and 2.
	only protocol
}

// in reports whether the attack can be expressed in a protocol.
func (a attack) in(proto protocol) bool {
	if a.only == "" {
		return proto != http3
	}
	return a.only == proto
}

// Failure is a request with which the proxy failed.
type Failure struct {
	Pitfall, Protocol, Reason string
	// Attack is the number of the attack, for [Options].Only.
	Attack int
	// Request is what was sent: a shell command that prints the bytes of HTTP/1.1,
	// or the fields of HTTP/2 and HTTP/3.
	Request string
}

// Result counts what came of the attacks of one kind.
type Result struct {
	Pitfall, Protocol    string
	Tried, Passed, Ended int // ended: with nothing at the recorder
	Failures             []Failure
}

// Options narrow a run down.
type Options struct {
	// Only is the number of the one attack to make; all if it is 0.
	Only int
	// First says that the first failure ends the run.
	First bool
}

// timeout is how long a proxy may take to answer a request.
const timeout = 10 * time.Second

// Run makes all attacks and returns what came of them, by pitfall and protocol. It
// is an error if an honest request does not get through, or is not answered where
// none may: then nothing is shown. One that arrives as somebody else is a failure,
// and the only one that is looked for then.
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
	// A proxy that has hung up may have sent something on nevertheless.
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

// tryOf says what a marker was for.
type tryOf struct {
	attack attack
	number int
	proto  protocol
	result int
}

// resultOf returns the index of the result of a kind, which it adds if need be.
func resultOf(results *[]Result, pitfall string, proto protocol) int {
	i := slices.IndexFunc(*results, func(r Result) bool { return r.Pitfall == pitfall && r.Protocol == string(proto) })
	if i < 0 {
		i = len(*results)
		*results = append(*results, Result{Pitfall: pitfall, Protocol: string(proto)})
	}
	return i
}

// probe makes honest requests. It is an error if they do not fare as they have to,
// but a failure if one arrives as somebody else.
func (p Proxy) probe(ctx context.Context) ([]Result, error) {
	for _, proto := range p.protocols() {
		for _, honest := range []attack{{}, {method: "POST", body: "{}"}} {
			reason, arrived, err := p.try(ctx, p.Seen.marker(), proto, honest)
			switch {
			case reason != "":
				failure := Failure{Pitfall: honestID, Protocol: string(proto), Reason: reason, Request: honest.show(p, proto)}
				return []Result{{Pitfall: honestID, Protocol: string(proto), Tried: 1, Failures: []Failure{failure}}}, nil
			case p.Nobody || proto == http3:
				// It has to be refused. That nobody was there is no refusal.
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

// verdict says what is wrong about a request of an attack that arrived.
func (p Proxy) verdict(a attack, r *http.Request) string {
	if p.Nobody || a.refused || (a.refusedPlain && !p.TLS) {
		return fmt.Sprintf("it arrived, as user %q; it must not at all", r.Header["Impersonate-User"])
	}
	if reason := p.judge(r); reason != "" || a.arrives == nil {
		return reason
	}
	return a.arrives(r)
}

// try sends an attack and says what is wrong about what arrived, nothing if all is
// well, and whether anything did. An error says that there was no answer: it was
// hung up on, reset, or not understood.
func (p Proxy) try(ctx context.Context, marker string, proto protocol, a attack) (reason string, arrived bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	switch proto {
	case http1:
		err = p.sendHTTP1(ctx, a.bytesFor(p, marker), a.behind != "")
	case http2:
		err = p.sendHTTP2(ctx, a, marker)
	case http3:
		err = p.sendHTTP3(ctx, a, marker)
	}
	for _, r := range p.Seen.take(marker) {
		arrived = true
		if reason := p.verdict(a, r); reason != "" {
			return reason, true, err
		}
	}
	return "", arrived, err
}

// judge says what is wrong about a request that arrived.
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
				return fmt.Sprintf("%s: %q arrived, which is not the proxy's", name, values)
			}
		case folded == "sec-websocket-protocol":
			if strings.Contains(fold(strings.Join(values, ",")), "bearer-authorization") {
				return fmt.Sprintf("%s: %q arrived", name, values)
			}
		case folded == "x-forwarded-for":
			if p.From != "" && !slices.Equal(values, []string{p.From}) {
				return fmt.Sprintf("%s: %q arrived; the audit log is to name %s", name, values, p.From)
			}
		}
		for _, canary := range canaries {
			if strings.Contains(strings.Join(values, ","), canary) {
				return fmt.Sprintf("%s: %q arrived, which the client made up", name, values)
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

// canaries are in values that clients make up, and must not arrive in any header.
var canaries = []string{forged, "stolen", "c3RvbGVu"}

// fold returns the name of a header as something on the way may read it.
func fold(name string) string {
	return strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
}
