// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recheck"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/refusal"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/tailnet"
)

// allowed are the counters of requests that are sent on, and refused is that of
// those that are not: looked up here and not for every request.
var (
	allowed = map[impersonate.Source]prometheus.Counter{
		impersonate.SourceGrants: metrics.Decisions.WithLabelValues(metrics.Allowed, string(impersonate.SourceGrants)),
		impersonate.SourceTags:   metrics.Decisions.WithLabelValues(metrics.Allowed, string(impersonate.SourceTags)),
		impersonate.SourceNone:   metrics.Decisions.WithLabelValues(metrics.Allowed, string(impersonate.SourceNone)),
	}
	refused = metrics.Decisions.WithLabelValues(metrics.Refused, "")
)

// What has not been counted yet is zero, rather than missing: Prometheus would not
// see the first of what is missing.
func init() {
	for _, outcome := range metrics.Outcomes {
		metrics.Questions.WithLabelValues(outcome)
	}
	for _, reason := range recheck.Reasons {
		metrics.Revocations.WithLabelValues(string(reason))
	}
	for _, reason := range refusal.Reasons {
		metrics.Refusals.WithLabelValues(string(reason))
	}
	for _, outcome := range recording.Outcomes {
		metrics.Recordings.WithLabelValues(string(outcome))
	}
	for _, outcome := range apievents.Outcomes {
		metrics.Events.WithLabelValues(string(outcome))
	}
}

// refuse answers r with err. decided is what is known about its caller, nil if
// that is nothing.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, decided *decision, err *apierrors.StatusError) error {
	refused.Inc()
	h.logRefusal(r, decided, err)
	return refusal.Write(w, err)
}

// logRefusal says in the log what the caller reads, and who that is.
func (h *Handler) logRefusal(r *http.Request, decided *decision, err *apierrors.StatusError) {
	if decided == nil {
		refusal.Log(h.logger, r, err)
		return
	}
	refusal.Log(h.logger, r, err, decided.identity.Fields()...)
}

// logAllowed logs that r is sent on, where anybody wants to read that.
func (h *Handler) logAllowed(r *http.Request, d *decision) {
	entry := h.logger.Check(zapcore.DebugLevel, "request allowed")
	if entry == nil {
		return
	}
	entry.Write(append(d.identity.Fields(),
		zap.String("remote_addr", r.RemoteAddr),
		zap.String("method", r.Method),
		zap.String("uri", r.RequestURI),
		zap.String("request_id", refusal.RequestID(r)))...)
}

// about returns err with a reason and with the peer that it is about.
func about(peer impersonate.Peer, reason refusal.Reason, err *apierrors.StatusError) *apierrors.StatusError {
	return refusal.About(peer.Node, peer.String(), refusal.Because(reason, err))
}

// countQuestion counts a question to a tailnet node that was asked then and
// answered with err.
func countQuestion(asked time.Time, err error) {
	outcome := metrics.Known
	switch {
	case errors.Is(err, tailnet.ErrSelf):
		return // nobody was asked
	case errors.Is(err, tailnet.ErrPeerNotFound):
		outcome = metrics.Unknown
	case err != nil:
		outcome = metrics.Failed
	}
	metrics.Questions.WithLabelValues(outcome).Observe(time.Since(asked).Seconds())
}
