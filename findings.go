// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoiscache"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// findings are what [Handler.judge] finds out on its way, for whoever wants to know
// how it came to its decision. Its methods do nothing on a nil pointer.
type findings struct {
	peer impersonate.Peer
	why  impersonate.Explanation
	// identity is what is left of it within the operators' limits, cut are the
	// groups that are not.
	identity impersonate.Identity
	cut      []string
}

// of notes who the peer is and returns where to explain its identity.
func (f *findings) of(peer impersonate.Peer) *impersonate.Explanation {
	if f == nil {
		return nil
	}
	f.peer = peer
	return &f.why
}

func (f *findings) limited(id impersonate.Identity, cut []string) {
	if f != nil {
		f.identity, f.cut = id, cut
	}
}

// facts asks anew who the peer of key is, and returns all that there is to say
// about it. It is an error if the peer is not known, or nobody can tell. That it is
// known and refused is one of the facts.
func (h *Handler) facts(ctx context.Context, key whoiscache.Key) (*whoami.Facts, *apierrors.StatusError) {
	var found findings
	decided, err := h.judge(ctx, key, &found)
	f := &whoami.Facts{
		Address: key.Remote.String(),
		Proxy:   key.Node.Name,
	}
	if err != nil {
		var refused *apierrors.StatusError
		switch {
		case !errors.As(err, &refused):
			return nil, unanswered(key, err)
		case found.peer.Node == "" && found.peer.Login == "":
			return nil, refused
		}
		f.Refused, f.Reason = refused.ErrStatus.Message, string(apistatus.ReasonOf(refused))
	} else {
		f.User = decided.identity.User
		f.Source = string(decided.identity.Source)
		f.Recording = h.recordingOf(&decided.identity)
	}
	peer := &found.peer
	f.ID, f.Device, f.Login, f.Tags, f.Shared = string(peer.NodeID), peer.Node, peer.Login, peer.Tags, peer.Shared
	f.Capability = string(found.why.Capability)
	f.LooksFor = string(h.Capabilities()[0])
	for _, grant := range found.why.Grants {
		f.Grants = append(f.Grants, whoami.Grant{Value: json.RawMessage(grant.Value), Groups: grant.Groups})
	}
	if decided != nil {
		for _, group := range decided.identity.Groups {
			f.Groups = append(f.Groups, whoami.Group{Name: group, Grants: found.givenBy(strings.TrimPrefix(group, h.GroupPrefix))})
		}
	}
	for _, group := range found.cut {
		f.Cut = append(f.Cut, whoami.Cut{Name: group, Option: h.RemovedBy(group), Grants: found.givenBy(group)})
	}
	return f, nil
}

// givenBy returns the numbers, from 1, of the grants that give a group.
func (f *findings) givenBy(group string) (numbers []int) {
	for i, grant := range f.why.Grants {
		if slices.Contains(grant.Groups, group) {
			numbers = append(numbers, i+1)
		}
	}
	return numbers
}

// recordingOf says whether id's sessions are recorded.
func (h *Handler) recordingOf(id *impersonate.Identity) whoami.Recording {
	r := whoami.Recording{
		Wanted:   id.Recording.Wanted() || h.Record != "",
		Files:    h.Record != "",
		Enforced: id.Recording.Enforce,
		Requests: id.Recording.Events || h.Events != "",
	}
	for _, recorder := range id.Recording.Recorders {
		r.Recorders = append(r.Recorders, recorder.String())
	}
	return r
}
