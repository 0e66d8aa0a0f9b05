// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// actAs returns the identity of the user that caller asks to act as in r, if the API
// server that r goes to allows that.
func (t *Transport) actAs(r *http.Request, caller *impersonate.Identity) (*impersonate.Identity, error) {
	asked, host, agent := caller.ActAs, r.URL.Host, userAgent
	if caller.RequestID != "" {
		// The reviews are the only trace of a refused request in the audit log.
		agent += " (request " + caller.RequestID + ")"
	}
	question := accessreview.Question{
		Caller:  caller,
		Target:  asked.Target,
		Request: requestinfo.Parse(r),
		Since:   time.Now().Add(-asked.MaxAge),
	}
	ask := func(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		return t.cluster.review(ctx, host, agent, review)
	}
	id, err := t.reviewer.Authorize(r.Context(), ask, question)
	if err != nil {
		return nil, err
	}
	if asked.Granted != nil {
		asked.Granted(func(ctx context.Context, caller *impersonate.Identity, since time.Time) error {
			again := question
			again.Caller, again.Since = caller, since
			_, err := t.reviewer.Authorize(ctx, ask, again)
			return err
		})
	}
	return id, nil
}

// userAgent is the User-Agent of the proxy's own requests to the API server.
const userAgent = "caddy-tailscale-impersonate"

// maxReview is the longest answer to a review that is read, in bytes.
const maxReview = 1 << 20

// review sends review, which may be a SelfSubjectAccessReview, to the API server at
// host, as the proxy itself and with agent for a User-Agent, and returns what the API
// server decides.
func (c *cluster) review(ctx context.Context, host, agent string, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
	body, err := json.Marshal(review)
	if err != nil {
		return nil, fmt.Errorf("encoding a subject access review: %w", err)
	}
	authorization, _, err := c.authorization()
	if err != nil {
		return nil, fmt.Errorf("no credentials for the cluster: %w", err)
	}
	at := url.URL{Scheme: c.base.Scheme, Host: host, Path: "/apis/" + review.APIVersion + "/" + strings.ToLower(review.Kind) + "s"}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, at.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json")
	r.Header.Set("User-Agent", agent)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	resp, err := c.send(c.request(r))
	if err != nil {
		return nil, fmt.Errorf("the API server does not answer: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxReview))
	if err != nil {
		return nil, fmt.Errorf("reading the API server's answer: %w", err)
	}
	if resp.StatusCode != http.StatusCreated {
		if resp.StatusCode == http.StatusUnauthorized {
			c.renew()
		}
		var status metav1.Status
		if json.Unmarshal(answer, &status) != nil || status.Message == "" {
			return nil, fmt.Errorf("the API server answers %s to a subject access review", resp.Status)
		}
		return nil, fmt.Errorf("the API server refuses the proxy a subject access review: %s", status.Message)
	}
	var out authorizationv1.SubjectAccessReview
	if err := json.Unmarshal(answer, &out); err != nil {
		return nil, fmt.Errorf("reading the API server's answer: %w", err)
	}
	return &out.Status, nil
}
