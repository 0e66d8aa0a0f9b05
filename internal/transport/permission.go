// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
	authorizationv1 "k8s.io/api/authorization/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

const (
	// grantCommand gives the proxy's account the permissions that it needs.
	grantCommand = "caddy tailscale-impersonate rbac --policy policy.hujson | kubectl apply -f -"
	// permissionMaxAge is how old a review may be that allowed the proxy's account
	// something.
	permissionMaxAge = time.Second
	// maxForbidden is the length of the longest 403 that is read, in bytes.
	maxForbidden = 4096
)

// askOwn asks the API server at host what the proxy's own account may do.
func (t *Transport) askOwn(host string) accessreview.Ask {
	return func(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		return t.cluster.review(ctx, host, userAgent, review)
	}
}

// onStarted is called when Caddy has started a config.
type onStarted func()

// Handle implements [caddyevents.Handler].
func (f onStarted) Handle(context.Context, caddy.Event) error {
	f()
	return nil
}

// checkWhenStarted makes Caddy check in the background, once it has started the config,
// that the proxy's account may impersonate any user.
func (t *Transport) checkWhenStarted(ctx caddy.Context) error {
	// reverse_proxy has loaded it. Only in unit tests is there no config.
	events, err := ctx.AppIfConfigured("events")
	if errors.Is(err, caddy.ErrNotConfigured) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	return events.(*caddyevents.App).On("started", onStarted(func() { go t.checkPermission(ctx) }))
}

// checkPermission logs a warning unless the proxy's account may impersonate any user.
func (t *Transport) checkPermission(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, accessreview.Timeout)
	defer cancel()
	missing, err := t.reviewer.MissingForUsers(ctx, t.askOwn(t.cluster.base.Host))
	switch {
	case err != nil:
		// reverse_proxy may reach the API server at another address.
		t.logger.Debug("cannot find out whether the proxy's account may impersonate all users", zap.Error(err))
	case missing != "":
		t.logger.Warn("the proxy's account may not impersonate all users, and the API server refuses the requests of the others",
			zap.String("missing", missing), zap.String("command", grantCommand))
	}
}

// explainForbidden returns resp, the API server's 403 to r, which was sent as id, or
// another response if it is the proxy's account that lacks a permission. The API server
// says so as well, but kubectl often prints only "unknown", and callers do not know the
// account.
//
// Callers choose what they ask for, and pods and aggregated API servers what they answer.
// The text of resp is therefore only a reason to ask the API server what the account
// lacks.
func (t *Transport) explainForbidden(r *http.Request, resp *http.Response, id *impersonate.Identity) (*http.Response, error) {
	if resp.ContentLength <= 0 || resp.ContentLength > maxForbidden {
		return resp, nil
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body = replay{io.MultiReader(bytes.NewReader(body), resp.Body), resp.Body}
	// In JSON as well as in the binary encodings.
	if err != nil || !bytes.Contains(body, []byte(" cannot impersonate")) {
		return resp, nil
	}
	target := &impersonate.Target{User: id.User, UID: id.UID, Groups: id.Groups, Extra: make(map[string][]string)}
	maps.Copy(target.Extra, id.Extra)
	if id.RequestID != "" {
		target.Extra[impersonate.ExtraRequestID] = []string{id.RequestID}
	}
	missing, err := t.reviewer.Missing(r.Context(), t.askOwn(r.URL.Host), accessreview.Question{
		Target:  target,
		Request: requestinfo.Parse(r),
		Since:   time.Now().Add(-permissionMaxAge),
	})
	if err != nil || missing == "" {
		return resp, nil
	}
	_ = resp.Body.Close()
	return t.refuse(r, apistatus.Forbidden(apistatus.NoPermission, "the proxy's account may not act as %s, until an administrator of the cluster runs %q: %s", clip.String(id.User), grantCommand, missing))
}

// replay is a body that begins with what has been read of it.
type replay struct {
	io.Reader
	io.Closer
}
