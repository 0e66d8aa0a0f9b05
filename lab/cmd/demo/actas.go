// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// showActingAs shows a `kubectl --as` that is allowed and one that is refused, and
// the audit log's entries about both.
func showActingAs(ctx context.Context, l *lab.Lab) error {
	fmt.Println("\nAlice, who may do anything, acts as bob:")
	out, err := kubectl(ctx, l.Callers["alice"], "auth", "whoami", "--as", "bob@example.com", "--as-group", "tailnet-readers")
	if err != nil || !strings.Contains(out, "bob@example.com") {
		return fmt.Errorf("alice may not act as bob: %w: %s", err, out)
	}
	fmt.Println("\nBob wants to read secrets as alice:")
	out, err = kubectl(ctx, l.Callers["bob"], "get", "--raw", "/api/v1/namespaces/default/secrets", "--as", "alice@example.com")
	if err == nil || !strings.Contains(out, `"bob@example.com" cannot impersonate resource "users"`) {
		return fmt.Errorf("the error does not name the permission that bob lacks: %s", out)
	}
	events, err := auditEvents(l.Cluster.AuditLog())
	if err != nil {
		return err
	}
	fmt.Println("\nThe API server's audit log about the first command, and about the check whether bob may:")
	acted, asked := false, false
	for _, e := range events {
		switch {
		case e.ImpersonatedUser.Extra[impersonate.ExtraOriginalUser] != nil:
			acted = true
			err = show(e.AuditID, "impersonatedUser", e.ImpersonatedUser)
		case e.RequestObject.Spec.User == "bob@example.com" && !e.ResponseObject.Status.Allowed:
			asked = true
			err = show(e.UserAgent, "requestObject", e.RequestObject)
		}
		if err != nil {
			return err
		}
	}
	if !acted || !asked {
		return fmt.Errorf("the audit log %s lacks an entry: acting as bob found: %t; request to act as alice found: %t", l.Cluster.AuditLog(), acted, asked)
	}
	return nil
}

// kubectl runs kubectl as a caller, and prints and returns its output.
func kubectl(ctx context.Context, c *lab.Caller, args ...string) (string, error) {
	cmd, err := c.Kubectl(ctx, args...)
	if err != nil {
		return "", err
	}
	out, err := cmd.CombinedOutput()
	said := strings.TrimSpace(string(out))
	fmt.Printf("\n\t%s$ kubectl %s\n\t%s\n", c.Name, strings.Join(args, " "), strings.ReplaceAll(said, "\n", "\n\t"))
	return said, err
}

// auditEvent has the fields of an audit event that are shown.
type auditEvent struct {
	AuditID          string   `json:"auditID"`
	Verb             string   `json:"verb"`
	RequestURI       string   `json:"requestURI"`
	UserAgent        string   `json:"userAgent"`
	ImpersonatedUser userInfo `json:"impersonatedUser"`
	RequestObject    struct {
		Spec authorizationv1.SubjectAccessReviewSpec `json:"spec"`
	} `json:"requestObject"`
	ResponseObject struct {
		Status authorizationv1.SubjectAccessReviewStatus `json:"status"`
	} `json:"responseObject"`
}

type userInfo struct {
	Username string              `json:"username"`
	Groups   []string            `json:"groups"`
	Extra    map[string][]string `json:"extra"`
}

// auditEvents returns the events of an audit log.
func auditEvents(path string) ([]auditEvent, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var events []auditEvent
	for line := range bytes.Lines(content) {
		var e auditEvent
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		events = append(events, e)
	}
	return events, nil
}

// show prints a part of an event.
func show(event, name string, part any) error {
	text, err := json.Marshal(part)
	if err != nil {
		return err
	}
	fmt.Printf("\n\t%s\n\t%s: %s\n", event, name, text)
	return nil
}
