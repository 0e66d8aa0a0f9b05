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

// Proxy is a proxy under attack. The caller's device is one that it lets through.
type Proxy struct {
	// Name is what the table calls it.
	Name string
	// Address is its host:port, and Host the name that requests give it.
	Address, Host string
	// TLS says that it is to be spoken to over TLS, which is what HTTP/2 needs
	// here. Certificates are not checked.
	TLS bool
	// Dial connects to it as the caller.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Want is the caller's identity, and From its address as the API server's
	// audit log has to name it, empty if that is not to be judged.
	Want Identity
	From string
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
)

// field is a header field as it is sent: nothing is corrected.
type field struct{ name, value string }

// attack is a request that tries something.
type attack struct {
	pitfall string
	method  string // default: GET
	path    string // what is asked for, behind the marker; default: nothing
	// target is the request target, with %s for the path, if it is not the path.
	target  string
	fields  []field
	body    string // raw, behind the header
	trailer bool   // whether body is chunked and ends with trailers
	// refused says that nothing may arrive, whatever identity it has.
	refused bool
	// only is the one protocol in which it can be expressed; empty for both.
	only protocol
}

// Failure is a request with which the proxy failed.
type Failure struct {
	Pitfall, Protocol, Reason string
	// Request is what was sent: the bytes of HTTP/1.1, or the fields of HTTP/2.
	Request string
}

// Result counts what came of the attacks of one kind.
type Result struct {
	Pitfall, Protocol    string
	Tried, Passed, Ended int // ended: with nothing at the recorder
	Failures             []Failure
}

// timeout is how long a proxy may take to answer a request.
const timeout = 10 * time.Second

// Run makes all attacks and returns what came of them, by pitfall and protocol. It
// is an error if an honest request does not get through: then nothing is shown.
func Run(ctx context.Context, p Proxy) ([]Result, error) {
	protocols := []protocol{http1}
	if p.TLS {
		protocols = append(protocols, http2)
	}
	for _, proto := range protocols {
		for _, honest := range []attack{{}, {method: "POST", body: "{}"}} {
			if reason, arrived := p.try(ctx, p.Seen.marker(), proto, honest); reason != "" || !arrived {
				return nil, fmt.Errorf("%s: an honest request does not get through over %s: %s", p.Name, proto, reason)
			}
		}
	}
	var results []Result
	tried := make(map[string]tryOf)
	for _, a := range attacks() {
		for _, proto := range protocols {
			if a.only != "" && a.only != proto {
				continue
			}
			i := slices.IndexFunc(results, func(r Result) bool { return r.Pitfall == a.pitfall && r.Protocol == string(proto) })
			if i < 0 {
				i = len(results)
				results = append(results, Result{Pitfall: a.pitfall, Protocol: string(proto)})
			}
			r := &results[i]
			marker := p.Seen.marker()
			tried[marker] = tryOf{a, proto, i}
			reason, arrived := p.try(ctx, marker, proto, a)
			r.Tried++
			switch {
			case reason != "":
				r.Failures = append(r.Failures, Failure{a.pitfall, string(proto), reason, a.show(p, proto)})
			case arrived:
				r.Passed++
			default:
				r.Ended++
			}
			if err := ctx.Err(); err != nil {
				return results, err
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
				results[late.result].Failures = append(results[late.result].Failures, Failure{late.attack.pitfall, string(late.proto), reason, late.attack.show(p, late.proto)})
			}
		}
	}
	return results, nil
}

// tryOf says what a marker was for.
type tryOf struct {
	attack attack
	proto  protocol
	result int
}

// verdict says what is wrong about a request of an attack that arrived.
func (p Proxy) verdict(a attack, r *http.Request) string {
	if a.refused {
		return "it must not arrive at all"
	}
	return p.judge(r)
}

// try sends an attack and says what is wrong about what arrived, nothing if all is
// well, and whether anything did.
func (p Proxy) try(ctx context.Context, marker string, proto protocol, a attack) (reason string, arrived bool) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	// That there is no answer is one: it was hung up on, reset, or not understood.
	if proto == http2 {
		_ = p.sendHTTP2(ctx, a.fieldsFor(p, marker), a.body)
	} else {
		_ = p.sendHTTP1(ctx, a.bytesFor(p, marker))
	}
	for _, r := range p.Seen.take(marker) {
		arrived = true
		if reason := p.verdict(a, r); reason != "" {
			return reason, true
		}
	}
	return "", arrived
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
		case folded == "x-real-ip", folded == "forwarded", folded == "audit-id":
			if strings.Contains(strings.Join(values, ","), forged) {
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

// fold returns the name of a header as something on the way may read it.
func fold(name string) string {
	return strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
}
