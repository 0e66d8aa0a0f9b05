// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"k8s.io/client-go/transport"
)

// extraDomain starts the keys of all extra fields that are written here. Nobody
// else may write one that starts with it.
const extraDomain = "tailscale-impersonate.github.io/"

// The keys of the extra fields that say who sent a request. They are in lower
// case, as the API server reads keys in no other way.
const (
	ExtraNode         = extraDomain + "node"          // the tailnet name of the device
	ExtraNodeID       = extraDomain + "node-id"       // the stable ID of the device
	ExtraAddress      = extraDomain + "address"       // the device's address on the tailnet
	ExtraTags         = extraDomain + "tags"          // the device's tags, one value each
	ExtraGroupsSource = extraDomain + "groups-source" // where the groups came from: a Source
	ExtraRequestID    = extraDomain + "request-id"    // what the request is called
)

// AuditExtras are the keys that [Peer.Audited] and a request's ID add up to: those
// that the proxy's account has to be allowed to impersonate.
var AuditExtras = []string{ExtraNode, ExtraNodeID, ExtraAddress, ExtraTags, ExtraGroupsSource, ExtraRequestID}

// OriginalExtras are the keys that [Identity.As] adds to those.
var OriginalExtras = []string{ExtraOriginalUser, ExtraOriginalUID, ExtraOriginalGroups, ExtraNode}

// auditIDHeader names a request in the API server's audit log.
const auditIDHeader = "Audit-Id"

// Audited returns id, which is what p may be called, with what an audit log or an
// admission policy wants to know about p: as UID that of the user, or of the device
// where no user has one, and the extra fields. remote is p's address.
//
// The tags of a device that was shared in are left out: they were given in another
// tailnet, and a policy that lets tag:admin do something means this one's.
//
// It is an error, with a zero Identity, if p has no name or ID, or if any of it is
// not what a header carries unaltered.
func (p Peer) Audited(id Identity, remote netip.Addr) (Identity, error) {
	if p.NodeID == "" {
		return Identity{}, errors.New("audit is on, and the tailnet node's answer names no ID of the device")
	}
	id.UID = string(p.NodeID)
	if !p.UserID.IsZero() {
		id.UID = strconv.FormatInt(int64(p.UserID), 10)
	}
	id.Extra = map[string][]string{
		ExtraNode:         {p.Node},
		ExtraNodeID:       {string(p.NodeID)},
		ExtraAddress:      {remote.String()},
		ExtraGroupsSource: {string(id.Source)},
	}
	if p.Tagged() && !p.Shared {
		id.Extra[ExtraTags] = p.Tags
	}
	for key, values := range id.Extra {
		for _, value := range values {
			if err := checkName(strings.TrimPrefix(key, extraDomain), value); err != nil {
				return Identity{}, fmt.Errorf("audit is on, and %w", err)
			}
		}
	}
	return id, nil
}

// extraHeader returns the name of the header for an extra field.
func extraHeader(key string) string {
	if name, ok := ownExtraHeaders[key]; ok {
		return name
	}
	return encodeExtraHeader(key)
}

// ownExtraHeaders are the names of the headers for our own keys, as nearly all that
// are written are of these.
var ownExtraHeaders = func() map[string]string {
	names := make(map[string]string)
	for _, key := range slices.Concat(AuditExtras, OriginalExtras) {
		names[key] = encodeExtraHeader(key)
	}
	return names
}()

// encodeExtraHeader returns the name of the header for an extra field, in
// canonical form.
//
// The API server puts the name into lower case and then decodes it like a path.
// So whatever a header's name cannot hold, and letters in upper case, are
// percent-encoded; the case of the digits makes no difference.
func encodeExtraHeader(key string) string {
	var name strings.Builder
	name.WriteString(transport.ImpersonateUserExtraHeaderPrefix)
	for _, b := range []byte(key) {
		switch {
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9', b == '-', b == '.':
			name.WriteByte(b)
		default:
			fmt.Fprintf(&name, "%%%02x", b)
		}
	}
	return http.CanonicalHeaderKey(name.String())
}
