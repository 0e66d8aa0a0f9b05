// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	portforward "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/apimachinery/pkg/util/remotecommand"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// kind is what a request is to whoever records sessions.
type kind string

const (
	ordinary  kind = "ordinary"     // no session
	exec      kind = "exec"         // recorded
	attach    kind = "attach"       // recorded
	forward   kind = "port-forward" // noted
	door      kind = "other"        // a session that cannot be recorded
	ambiguous kind = "ambiguous"    // might be anything
)

// kindOf returns what a request that asks for i is.
func kindOf(i requestinfo.Info) kind {
	switch {
	case i.Ambiguous:
		return ambiguous
	case !i.Interactive:
		return ordinary
	case i.IsResourceRequest && i.APIGroup == "" && i.Resource == "pods":
		switch i.Subresource {
		case "exec":
			return exec
		case "attach":
			return attach
		case "portforward":
			return forward
		case "ephemeralcontainers":
			// It changes the pod, as creating one does. What leads into the
			// container is attach.
			if i.Verb == "patch" || i.Verb == "update" {
				return ordinary
			}
		}
	}
	return door
}

// decision is what Begin decided about a request.
type decision struct {
	kind                   kind
	namespace, name, query string
}

func decide(r *http.Request) decision {
	info := requestinfo.Parse(r)
	d := decision{kind: kindOf(info)}
	if d.kind != ordinary {
		d.namespace, d.name, d.query = info.Namespace, info.Name, r.URL.RawQuery
	}
	return d
}

type decisionKey struct{}

// Confirm returns why r, the request that is about to be sent to the API server,
// must not be: it is not what [Site.Begin] decided about. Requests about which
// nothing was decided are confirmed.
func Confirm(r *http.Request) *apierrors.StatusError {
	decided, ok := r.Context().Value(decisionKey{}).(decision)
	if !ok || decide(r) == decided {
		return nil
	}
	return apistatus.Forbidden(apistatus.Rewritten, "the path or the query was changed on its way through the proxy, after it was decided whether to record the session")
}

// withDecision returns r with d in its context.
func withDecision(r *http.Request, d decision) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), decisionKey{}, d))
}

// The protocols that are understood, by what is upgraded to.
const (
	spdyUpgrade      = "spdy/3.1"
	websocketUpgrade = "websocket"

	base64Channels   = "base64.channel.k8s.io"
	v4Base64Channels = "v4.base64.channel.k8s.io"
)

var (
	// What is said of a session's streams is the same in all versions.
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

// versions returns the names of the protocols that can be spoken over upgrade in a
// session of kind k.
func versions(upgrade string, k kind) []string {
	if k == attach {
		k = exec
	}
	if upgrade == spdyUpgrade {
		return spdyVersions[k]
	}
	return websocketVersions[k]
}

// upgradeOf returns what r's connection is to be upgraded to, or why a session
// cannot be recorded that way.
func upgradeOf(r *http.Request, k kind) (upgrade string, refused *apierrors.StatusError) {
	asked := field(r.Header, "Upgrade")
	if !httpguts.HeaderValuesContainsToken(field(r.Header, "Connection"), "upgrade") || len(asked) != 1 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s needs an upgrade of the connection, to SPDY/3.1 or websocket", k)
	}
	// The answer to a request with a body comes when all of the body has been sent,
	// and the command runs before that: for as long as the client likes, unrecorded.
	if r.ContentLength != 0 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s with a body in the request cannot be recorded", k)
	}
	upgrade = strings.ToLower(asked[0])
	if upgrade != spdyUpgrade && upgrade != websocketUpgrade {
		return "", apistatus.BadRequest(apistatus.Recording, "%s over %q cannot be recorded, only over SPDY/3.1 or websocket", k, asked[0])
	}
	known := versions(upgrade, k)
	offered := versionsIn(r.Header, upgrade)
	if upgrade == websocketUpgrade && len(offered) == 0 {
		return "", apistatus.BadRequest(apistatus.Recording, "%s over a WebSocket without a subprotocol cannot be recorded; offer one of %q", k, known)
	}
	for _, version := range offered {
		if !slices.Contains(known, version) {
			return "", apistatus.BadRequest(apistatus.Recording, "%s with the protocol %q cannot be recorded; offer nothing but these: %q", k, version, known)
		}
	}
	return upgrade, nil
}

// versionsIn returns the names of protocols in the headers h.
func versionsIn(h http.Header, upgrade string) []string {
	name := "Sec-WebSocket-Protocol"
	if upgrade == spdyUpgrade {
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

// field returns the values of the header name, in whatever spelling it is in h:
// reverse_proxy writes some in another than net/http does.
func field(h http.Header, name string) []string {
	var all []string
	for key, values := range h {
		if strings.EqualFold(key, name) {
			all = append(all, values...)
		}
	}
	return all
}

// removeField removes the header name from h.
func removeField(h http.Header, name string) {
	for key := range h {
		if strings.EqualFold(key, name) {
			delete(h, key)
		}
	}
}
