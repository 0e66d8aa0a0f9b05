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

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
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
	for _, reason := range revocation.Reasons {
		metrics.Revocations.WithLabelValues(string(reason))
	}
	for _, reason := range apistatus.Reasons {
		metrics.Refusals.WithLabelValues(string(reason))
	}
	for _, outcome := range sessionrecording.Outcomes {
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
	return apistatus.Write(w, err)
}

// logRefusal says in the log what the caller reads, and who that is.
func (h *Handler) logRefusal(r *http.Request, decided *decision, err *apierrors.StatusError) {
	if decided == nil {
		apistatus.Log(h.logger, r, err)
		return
	}
	apistatus.Log(h.logger, r, err, decided.identity.Fields()...)
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
		zap.String("request_id", apistatus.RequestID(r)))...)
}

// about returns err with a reason and with the peer that it is about.
func about(peer impersonate.Peer, reason apistatus.Reason, err *apierrors.StatusError) *apierrors.StatusError {
	return apistatus.About(peer.Node, peer.String(), apistatus.Because(reason, err))
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
