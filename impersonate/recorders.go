// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
	"net/netip"
	"slices"

	"tailscale.com/kube/kubetypes"
)

// Recording is what all of a caller's grants together say about the recording of
// sessions and requests.
type Recording struct {
	// Recorders are the addresses of all recorders, without duplicates, in the order
	// of the grants.
	Recorders []netip.AddrPort
	// Unresolved reports whether a grant names recorders by a tag, and the control
	// server has added no address for it.
	Unresolved bool
	// Enforce reports whether sessions must be recorded, as at least one grant or
	// record_groups says.
	Enforce bool
	// ByGroup reports whether Enforce is set only because record_groups names a group
	// that is in use.
	ByGroup bool
	// Events reports whether requests are recorded too, as at least one grant says.
	Events bool
}

// Wanted reports whether sessions are to be recorded, even if no address of a recorder
// is known.
func (r *Recording) Wanted() bool {
	return len(r.Recorders) > 0 || r.Unresolved || r.Enforce
}

// add adds what rule says to r.
func (r *Recording) add(rule kubetypes.KubernetesCapRule) error {
	for _, recorder := range rule.RecorderAddrs {
		// The empty string decodes to an invalid address without an error.
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
