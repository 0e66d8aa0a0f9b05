// SPDX-License-Identifier: Apache-2.0

package headscale

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// keyLifetime is how long a pre-auth key is valid. A demo may run for days.
const keyLifetime = 30 * 24 * time.Hour

// CreateUser creates a user with the given login name, such as
// alice@example.com.
func (s *Server) CreateUser(ctx context.Context, login string) error {
	err := s.call(ctx, http.MethodPost, "user", map[string]string{"name": login}, nil)
	if err != nil {
		return fmt.Errorf("create user %q: %w", login, err)
	}
	return nil
}

// RenameUser changes the login name of a user.
func (s *Server) RenameUser(ctx context.Context, login, renamed string) error {
	id, err := s.userID(ctx, login)
	if err == nil {
		err = s.call(ctx, http.MethodPost, "user/"+id+"/rename/"+url.PathEscape(renamed), nil, nil)
	}
	if err != nil {
		return fmt.Errorf("rename user %q to %q: %w", login, renamed, err)
	}
	return nil
}

// UserKey returns a pre-auth key with which any number of nodes can join as devices
// of the user with the given login name.
func (s *Server) UserKey(ctx context.Context, login string) (string, error) {
	id, err := s.userID(ctx, login)
	if err != nil {
		return "", fmt.Errorf("key for user %q: %w", login, err)
	}
	key, err := s.createKey(ctx, map[string]any{"user": id})
	if err != nil {
		return "", fmt.Errorf("key for user %q: %w", login, err)
	}
	return key, nil
}

// userID returns the ID of the user with the given login name.
func (s *Server) userID(ctx context.Context, login string) (string, error) {
	var answer struct {
		Users []struct {
			ID   string `json:"id"`
			Name string `json:"name"`
		} `json:"users"`
	}
	if err := s.call(ctx, http.MethodGet, "user?name="+url.QueryEscape(login), nil, &answer); err != nil {
		return "", err
	}
	if len(answer.Users) != 1 {
		return "", fmt.Errorf("%d users have that name", len(answer.Users))
	}
	return answer.Users[0].ID, nil
}

// TagKey returns a pre-auth key with which any number of nodes can join with the
// given tags, such as tag:k8s.
func (s *Server) TagKey(ctx context.Context, tags ...string) (string, error) {
	if len(tags) == 0 {
		return "", fmt.Errorf("key for tags: no tags given")
	}
	key, err := s.createKey(ctx, map[string]any{"aclTags": tags})
	if err != nil {
		return "", fmt.Errorf("key for tags %q: %w", tags, err)
	}
	return key, nil
}

// createKey creates the pre-auth key that req describes.
func (s *Server) createKey(ctx context.Context, req map[string]any) (string, error) {
	req["reusable"] = true
	req["expiration"] = time.Now().Add(keyLifetime).UTC().Format(time.RFC3339)
	var answer struct {
		PreAuthKey struct {
			Key string `json:"key"`
		} `json:"preAuthKey"`
	}
	if err := s.call(ctx, http.MethodPost, "preauthkey", req, &answer); err != nil {
		return "", err
	}
	return answer.PreAuthKey.Key, nil
}

// DeleteNode removes a node from the tailnet. The name is without the domain.
func (s *Server) DeleteNode(ctx context.Context, name string) error {
	id, err := s.nodeID(ctx, name)
	if err == nil {
		err = s.call(ctx, http.MethodDelete, "node/"+id, nil, nil)
	}
	if err != nil {
		return fmt.Errorf("delete node %q: %w", name, err)
	}
	return nil
}

// ExpireNode expires the key of a node: the node stays in the tailnet, but has to
// log in again. The name is without the domain.
func (s *Server) ExpireNode(ctx context.Context, name string) error {
	return s.setExpiry(ctx, name, "")
}

// ExpireNodeAt is like ExpireNode, at a later time.
func (s *Server) ExpireNodeAt(ctx context.Context, name string, at time.Time) error {
	return s.setExpiry(ctx, name, "?expiry="+url.QueryEscape(at.UTC().Format(time.RFC3339)))
}

// NeverExpireNode has the key of a node never expire. A node whose key has expired
// continues.
func (s *Server) NeverExpireNode(ctx context.Context, name string) error {
	return s.setExpiry(ctx, name, "?disableExpiry=true")
}

func (s *Server) setExpiry(ctx context.Context, name, query string) error {
	id, err := s.nodeID(ctx, name)
	if err == nil {
		err = s.call(ctx, http.MethodPost, "node/"+id+"/expire"+query, nil, nil)
	}
	if err != nil {
		return fmt.Errorf("set the key expiry of node %q: %w", name, err)
	}
	return nil
}

// SetTags replaces the tags of a node. If it had an owner, it loses it. The name is
// without the domain.
func (s *Server) SetTags(ctx context.Context, name string, tags ...string) error {
	id, err := s.nodeID(ctx, name)
	if err == nil {
		err = s.call(ctx, http.MethodPost, "node/"+id+"/tags", map[string]any{"tags": tags}, nil)
	}
	if err != nil {
		return fmt.Errorf("tag node %q: %w", name, err)
	}
	return nil
}

// nodeID returns the ID of the node with the given name.
func (s *Server) nodeID(ctx context.Context, name string) (string, error) {
	type node struct {
		ID        string `json:"id"`
		GivenName string `json:"givenName"`
	}
	var answer struct {
		Nodes []node `json:"nodes"`
	}
	if err := s.call(ctx, http.MethodGet, "node", nil, &answer); err != nil {
		return "", err
	}
	i := slices.IndexFunc(answer.Nodes, func(n node) bool { return n.GivenName == name })
	if i < 0 {
		return "", fmt.Errorf("no such node among %d", len(answer.Nodes))
	}
	return answer.Nodes[i].ID, nil
}

// call sends in to a method of Headscale's API and reads the answer into out. Either
// may be nil.
func (s *Server) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.url+"/api/v1/"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+s.apiKey)
	req.Header.Set("Content-Type", "application/json")
	res, err := s.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		var failure struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(answer, &failure) == nil && failure.Message != "" {
			return fmt.Errorf("headscale: %s", failure.Message)
		}
		return fmt.Errorf("headscale: %s: %s", strconv.Quote(res.Status), answer)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	return nil
}
