// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/http"
	"slices"
	"strings"

	portforward "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/apimachinery/pkg/util/remotecommand"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// kind says how a request is recorded. Recordings and the log have these names.
type kind string

const (
	ordinary     kind = "ordinary"     // not a session
	exec         kind = "exec"         // recorded
	attach       kind = "attach"       // recorded
	forward      kind = "port-forward" // logged
	unrecordable kind = "other"        // a session that cannot be recorded
	ambiguous    kind = "ambiguous"    // may be any of them
)

// Kinds are the kinds of sessions that are recorded or logged.
var Kinds = []string{string(exec), string(attach), string(forward)}

// kindOf returns the kind of a request that asks for i.
func kindOf(i requestinfo.Info) kind {
	if i.Ambiguous {
		return ambiguous
	}
	switch i.Kind() {
	case requestinfo.Exec:
		return exec
	case requestinfo.Attach:
		return attach
	case requestinfo.PortForward:
		return forward
	case requestinfo.Short, requestinfo.Watch, requestinfo.Log:
		return ordinary
	}
	return unrecordable
}

// decision is what Begin decides about a request.
type decision struct {
	kind                   kind
	namespace, name, query string // empty if kind is ordinary
}

func decide(r *http.Request) decision {
	info := requestinfo.Parse(r)
	d := decision{kind: kindOf(info)}
	if d.kind != ordinary {
		d.namespace, d.name, d.query = info.Namespace, info.Name, r.URL.RawQuery
	}
	return d
}

// holds returns an error if d is not the decision about out, the request that is about
// to be sent.
func (d decision) holds(out *http.Request) error {
	if decide(out) != d {
		return apistatus.Forbidden(apistatus.Rewritten, "the path or the query was changed on its way through the proxy, after it was decided whether to record the session")
	}
	return nil
}

// The protocols of a session's connection.
const (
	spdyUpgrade      = "spdy/3.1"
	websocketUpgrade = "websocket"

	base64Channels   = "base64.channel.k8s.io"
	v4Base64Channels = "v4.base64.channel.k8s.io"
)

// The names of the subprotocols that can be parsed. The streams are encoded in the
// same way in all versions.
var (
	spdyVersions = map[kind][]string{
		exec: {
			remotecommand.StreamProtocolV1Name, remotecommand.StreamProtocolV2Name, remotecommand.StreamProtocolV3Name,
			remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name,
		},
		forward: {portforward.PortForwardV1Name},
	}
	websocketVersions = map[kind][]string{
		exec: {
			remotecommand.StreamProtocolV1Name, remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name,
			base64Channels, v4Base64Channels,
		},
		forward: {portforward.WebsocketsSPDYTunnelingPortForwardV1, remotecommand.StreamProtocolV4Name, v4Base64Channels},
	}
)

// versions returns the names of the subprotocols that can be parsed in a session of
// kind k over the given protocol.
func versions(protocol string, k kind) []string {
	if k == attach {
		k = exec
	}
	if protocol == spdyUpgrade {
		return spdyVersions[k]
	}
	return websocketVersions[k]
}

// known reports whether version, which the API server chose, can be parsed.
func known(version, protocol string, k kind) bool {
	return version == "" && protocol == spdyUpgrade || slices.Contains(versions(protocol, k), version)
}

// upgradeOf returns the protocol that r asks to upgrade the connection to. It returns
// an error if a session over it cannot be recorded.
func upgradeOf(r *http.Request, k kind) (string, error) {
	asked, _ := upgrade.Protocols(r.Header)
	if len(asked) != 1 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s needs an upgrade of the connection, to SPDY/3.1 or websocket", k)
	}
	// The answer to a request with a body comes after the whole body, and the command
	// runs before: unrecorded, for as long as the client likes.
	if r.ContentLength != 0 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s with a body in the request cannot be recorded", k)
	}
	protocol := strings.ToLower(asked[0])
	if protocol != spdyUpgrade && protocol != websocketUpgrade {
		return "", apistatus.BadRequest(apistatus.Recording, "%s over %q cannot be recorded, only over SPDY/3.1 or websocket", k, clip.String(asked[0]))
	}
	known := versions(protocol, k)
	offered := versionsIn(r.Header, protocol)
	if protocol == websocketUpgrade && len(offered) == 0 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s over a WebSocket without a subprotocol cannot be recorded; offer one of %q", k, known)
	}
	for _, version := range offered {
		if !slices.Contains(known, version) {
			return "", apistatus.BadRequest(apistatus.Recording, "%s with the protocol %q cannot be recorded; offer nothing but these: %q", k, clip.String(version), known)
		}
	}
	return protocol, nil
}

// versionsIn returns the names of subprotocols in the headers h.
func versionsIn(h http.Header, protocol string) []string {
	name := "Sec-WebSocket-Protocol"
	if protocol == spdyUpgrade {
		name = "X-Stream-Protocol-Version"
	}
	var names []string
	for _, value := range field(h, name) {
		for name := range strings.SplitSeq(value, ",") {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// field returns the values of the header name in any spelling: reverse_proxy does not
// spell all of them as net/http does.
func field(h http.Header, name string) []string {
	var all []string
	for key, values := range h {
		if strings.EqualFold(key, name) {
			all = append(all, values...)
		}
	}
	return all
}

// removeField removes the header name in any spelling.
func removeField(h http.Header, name string) {
	for key := range h {
		if strings.EqualFold(key, name) {
			delete(h, key)
		}
	}
}
