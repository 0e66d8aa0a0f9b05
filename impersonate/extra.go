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

// extraDomain is the prefix of the keys of all extra fields that this package sets.
// Clients may not set extra fields with this prefix.
const extraDomain = "tailscale-impersonate.github.io/"

// The keys of the extra fields that describe the caller. They are in lower case, as
// the API server converts keys to lower case.
const (
	ExtraNode         = extraDomain + "node"          // the tailnet name of the device
	ExtraNodeID       = extraDomain + "node-id"       // the stable ID of the device
	ExtraAddress      = extraDomain + "address"       // the device's address on the tailnet
	ExtraTags         = extraDomain + "tags"          // the device's tags, one value each
	ExtraGroupsSource = extraDomain + "groups-source" // where the groups come from: a Source
	ExtraRequestID    = extraDomain + "request-id"    // the ID of the request
)

// AuditExtras are the keys that [Peer.Audited], [Limits.Choose] and [Identity.RequestID] set. The proxy's
// account needs the right to impersonate them.
var AuditExtras = []string{
	ExtraNode, ExtraNodeID, ExtraAddress, ExtraTags, ExtraGroupsSource, ExtraRequestID,
	ExtraChosenGroups, ExtraHeldBackGroups,
}

// OriginalExtras are the keys that [Identity.As] sets.
var OriginalExtras = []string{ExtraOriginalUser, ExtraOriginalUID, ExtraOriginalGroups, ExtraNode}

// auditIDHeader is the ID of a request in the API server's audit log.
const auditIDHeader = "Audit-Id"

// Audited returns id, the identity of p, with data for audit logs and admission policies:
// the UID of the user, or of the device if it has no user, and the extra fields. remote
// is p's address.
//
// It leaves out the tags of a device that was shared in: another tailnet assigned them,
// and an admission policy that names tag:admin means the tag of this one.
//
// It returns an error, with a zero Identity, if p has no name or ID, or if a header
// does not carry a value unaltered.
func (p Peer) Audited(id Identity, remote netip.Addr) (Identity, error) {
	if p.NodeID == "" {
		return Identity{}, errors.New("audit is on, and the tailnet node's answer has no ID of the device")
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
	id.setGroupExtras()
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

// ownExtraHeaders maps the keys that this package sets to the names of their headers.
// Nearly all extra fields have one of these keys.
var ownExtraHeaders = func() map[string]string {
	names := make(map[string]string)
	for _, key := range slices.Concat(AuditExtras, OriginalExtras) {
		names[key] = encodeExtraHeader(key)
	}
	return names
}()

// encodeExtraHeader returns the canonical name of the header for an extra field.
//
// The API server converts the name to lower case and then decodes it like a path.
// So upper-case letters are percent-encoded, and so is what the name of a header
// cannot hold.
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
