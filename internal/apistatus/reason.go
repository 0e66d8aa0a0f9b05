// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// Reason says in one word why a request was refused. It labels the metric and is the
// type of the first cause of the Status object, for programs that read it.
type Reason string

// The reasons.
const (
	Protocol       Reason = "protocol"         // a kind of request that is never forwarded
	WebPage        Reason = "web_page"         // a web page sent it that may not
	Host           Reason = "host"             // its Host is not this server
	NotFromTailnet Reason = "not_from_tailnet" // no tailnet node accepted its connection
	AmbiguousNode  Reason = "ambiguous_node"   // no single node can have accepted its connection
	Starting       Reason = "starting"         // the node, or Caddy, is not up yet
	Replaced       Reason = "replaced"         // its connection was accepted for a config that is no longer in use
	Stopping       Reason = "stopping"         // the node closes, and the request is for a stream
	UnknownPeer    Reason = "unknown_peer"     // the node does not know the peer
	Self           Reason = "self"             // the peer is the node itself
	NoAnswer       Reason = "no_answer"        // the node did not say who the peer is
	NotAdmitted    Reason = "not_admitted"     // the node no longer lets the peer open a connection
	NoIdentity     Reason = "no_identity"      // the peer's grants or names make no valid identity
	Guard          Reason = "guard"            // the operator's limits keep the peer out
	NoGroups       Reason = "no_groups"        // require_groups is on and the peer has no group
	Impersonation  Reason = "impersonation"    // it asks to act as another user
	AmbiguousPath  Reason = "ambiguous_path"   // programs disagree about what its path means
	Rewritten      Reason = "rewritten"        // the config changed it after a decision about it
	Recording      Reason = "recording"        // it must be recorded and cannot be
	NoHandler      Reason = "no_handler"       // it did not pass tailscale_impersonate
	NoCredentials  Reason = "no_credentials"   // the proxy has no credentials that the API server accepts
	NoPermission   Reason = "no_permission"    // the proxy's account may not impersonate the caller
	UpstreamAway   Reason = "upstream_away"    // the API server is unreachable
	Method         Reason = "method"           // the whoami page allows GET and HEAD only
	TooMuch        Reason = "too_much"         // its device makes the proxy hold too much at once
	Waiting        Reason = "waiting"          // too many sessions of its device wait for an answer
	HeaderFields   Reason = "header_fields"    // it has too many header fields
	UnknownSite    Reason = "unknown_site"     // it asks for the kubeconfig of a site that its caller may not use
	NotReader      Reason = "not_reader"       // its caller may not read recordings
	NoRecording    Reason = "no_recording"     // there is no such recording, or it cannot be read
	Other          Reason = "other"            // none of these
)

// Reasons lists every reason.
var Reasons = []Reason{
	Protocol, WebPage, Host, NotFromTailnet, AmbiguousNode, Starting, Replaced, Stopping, UnknownPeer, Self, NoAnswer, NotAdmitted,
	NoIdentity, Guard, NoGroups, Impersonation, AmbiguousPath, Rewritten, Recording, NoHandler, NoCredentials, NoPermission, UpstreamAway, Method,
	TooMuch, Waiting, HeaderFields, UnknownSite, NotReader, NoRecording, Other,
}

var refusals = metrics.NewCounter("refusals_total",
	"Requests that were answered with a refusal, by reason.",
	"reason", Reasons...)

// The fields of the causes in a Status object that name the refused caller.
const (
	fieldNode = "node"
	fieldUser = "user"
)

// About adds the caller's device and user, where known, to err, and returns it.
func About(node, user string, err error) error {
	status, ok := From(err)
	if !ok {
		return err
	}
	if status.Details == nil {
		status.Details = new(metav1.StatusDetails)
	}
	for _, c := range []metav1.StatusCause{{Field: fieldNode, Message: node}, {Field: fieldUser, Message: user}} {
		if c.Message != "" {
			status.Details.Causes = append(status.Details.Causes, c)
		}
	}
	return err
}

// Append returns a copy of err, a refusal, with more at the end of its message.
func Append(err error, format string, args ...any) error {
	status, ok := From(err)
	if !ok {
		return err
	}
	longer := status.DeepCopy()
	longer.Message += fmt.Sprintf(format, args...)
	return &apierrors.StatusError{ErrStatus: *longer}
}

// From returns the Status object of err, and whether it has one. The result is not a
// copy.
func From(err error) (*metav1.Status, bool) {
	var refused *apierrors.StatusError
	if !errors.As(err, &refused) || refused == nil {
		return nil, false
	}
	return &refused.ErrStatus, true
}

// ReasonOf returns the reason of err, [Other] if it has none.
func ReasonOf(err error) Reason {
	if status, ok := From(err); ok {
		if d := status.Details; d != nil && len(d.Causes) > 0 && d.Causes[0].Type != "" {
			return Reason(d.Causes[0].Type)
		}
	}
	return Other
}

// Of returns the device and user that [About] added to err, empty where unknown.
func Of(err error) (node, user string) {
	status, ok := From(err)
	if !ok || status.Details == nil {
		return "", ""
	}
	for _, c := range status.Details.Causes {
		switch c.Field {
		case fieldNode:
			node = c.Message
		case fieldUser:
			user = c.Message
		}
	}
	return node, user
}
