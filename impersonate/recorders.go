// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
	"net/netip"
	"slices"

	"tailscale.com/kube/kubetypes"
)

// Recording is what a caller's grants say, all of them together, about the
// recording of sessions and of requests.
type Recording struct {
	// Recorders are the addresses of the recorders that any grant names, in the
	// order in which the grants name them, each once.
	Recorders []netip.AddrPort
	// Unresolved reports whether a grant names recorders by a tag for which the
	// control server has put no address into the grant.
	Unresolved bool
	// Enforce reports whether a session must not go on unrecorded. One grant that
	// says so is enough.
	Enforce bool
	// Events reports whether requests are to be recorded as well. One grant that
	// says so is enough.
	Events bool
}

// Wanted reports whether sessions are to be recorded, by a recorder that may or
// may not be known.
func (r *Recording) Wanted() bool {
	return len(r.Recorders) > 0 || r.Unresolved || r.Enforce
}

// add adds what rule says.
func (r *Recording) add(rule kubetypes.KubernetesCapRule) error {
	for _, recorder := range rule.RecorderAddrs {
		// An empty text is read as an address that is none.
		if !recorder.IsValid() || recorder.Port() == 0 {
			return fmt.Errorf("recorderAddrs holds %q, which is not an address and a port", recorder)
		}
		recorder = netip.AddrPortFrom(recorder.Addr().Unmap(), recorder.Port())
		if !slices.Contains(r.Recorders, recorder) {
			r.Recorders = append(r.Recorders, recorder)
		}
	}
	r.Unresolved = r.Unresolved || len(rule.Recorders) > 0 && len(rule.RecorderAddrs) == 0
	r.Enforce = r.Enforce || rule.EnforceRecorder
	r.Events = r.Events || rule.EnableEvents
	return nil
}
