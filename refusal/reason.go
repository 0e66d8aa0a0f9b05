// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/metrics"
)

// Reason says in a word why a request was refused, for metrics and for whoever
// reads a Status object by program: it is the type of the object's first cause.
type Reason string

// The reasons.
const (
	Protocol       Reason = "protocol"         // a kind of request that is never sent on
	WebPage        Reason = "web_page"         // another site's web page sent it
	Host           Reason = "host"             // it is for another name
	NotFromTailnet Reason = "not_from_tailnet" // the connection is no tailnet node's
	AmbiguousNode  Reason = "ambiguous_node"   // no node, or more than one, can have accepted it
	Starting       Reason = "starting"         // the node, or Caddy, is not up yet
	UnknownPeer    Reason = "unknown_peer"     // the node knows no such peer
	Self           Reason = "self"             // the peer is the proxy itself
	NoAnswer       Reason = "no_answer"        // the node did not say who the peer is
	NoIdentity     Reason = "no_identity"      // what the tailnet says makes no identity
	Guard          Reason = "guard"            // the operators' limits keep the peer out
	NoGroups       Reason = "no_groups"        // require_groups is on and there is none
	Impersonation  Reason = "impersonation"    // it asks to be somebody else
	AmbiguousPath  Reason = "ambiguous_path"   // its path can be understood in more than one way
	Rewritten      Reason = "rewritten"        // it is no longer what was decided about
	Recording      Reason = "recording"        // it has to be recorded, and cannot be
	NoHandler      Reason = "no_handler"       // it has not passed tailscale_impersonate
	NoCredentials  Reason = "no_credentials"   // the proxy has none, or none that are accepted
	UpstreamAway   Reason = "upstream_away"    // the API server cannot be reached
	Method         Reason = "method"           // the whoami page is only read
	Other          Reason = "other"            // none of these
)

// Reasons are all of them.
var Reasons = []Reason{
	Protocol, WebPage, Host, NotFromTailnet, AmbiguousNode, Starting, UnknownPeer, Self, NoAnswer,
	NoIdentity, Guard, NoGroups, Impersonation, AmbiguousPath, Rewritten, Recording, NoHandler, NoCredentials, UpstreamAway, Method, Other,
}

// Because returns err with a reason.
func Because(reason Reason, err *apierrors.StatusError) *apierrors.StatusError {
	details := err.ErrStatus.Details
	if details == nil {
		details = new(metav1.StatusDetails)
		err.ErrStatus.Details = details
	}
	details.Causes = append([]metav1.StatusCause{{Type: metav1.CauseType(reason)}}, details.Causes...)
	return err
}

// The fields of a Status object's causes that say whom it is about.
const (
	fieldNode = "node"
	fieldUser = "user"
)

// About returns err with whom it is about, as far as that is known.
func About(node, user string, err *apierrors.StatusError) *apierrors.StatusError {
	if err.ErrStatus.Details == nil {
		err.ErrStatus.Details = new(metav1.StatusDetails)
	}
	for _, c := range []metav1.StatusCause{{Field: fieldNode, Message: node}, {Field: fieldUser, Message: user}} {
		if c.Message != "" {
			err.ErrStatus.Details.Causes = append(err.ErrStatus.Details.Causes, c)
		}
	}
	return err
}

// ReasonOf returns the reason of err.
func ReasonOf(err *apierrors.StatusError) Reason {
	if d := err.ErrStatus.Details; d != nil && len(d.Causes) > 0 && d.Causes[0].Type != "" {
		return Reason(d.Causes[0].Type)
	}
	return Other
}

// Of returns whom err is about, as far as that is known.
func Of(err *apierrors.StatusError) (node, user string) {
	if err.ErrStatus.Details == nil {
		return "", ""
	}
	for _, c := range err.ErrStatus.Details.Causes {
		switch c.Field {
		case fieldNode:
			node = c.Message
		case fieldUser:
			user = c.Message
		}
	}
	return node, user
}

func count(err *apierrors.StatusError) { metrics.Refusals.WithLabelValues(string(ReasonOf(err))).Inc() }
