// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"testing"
)

func TestAccessLog_NamesUser(t *testing.T) {
	const path = "/api/v1/namespaces/default/pods?labelSelector=access-log"
	if resp := send(t, "bob", "80", get(path)); resp.StatusCode != http.StatusOK {
		t.Fatalf("%s %s", resp.Status, resp.body)
	}
	eventually(t, "the access log names bob", func() error {
		user, err := loggedUser(path)
		if err == nil && user != "bob@example.com" {
			t.Fatalf("the access log names %q; want bob@example.com", user)
		}
		return err
	})
}

// loggedUser returns the user in the access log's entry for a request of that path,
// or io.EOF if there is no entry yet.
func loggedUser(path string) (string, error) {
	file, err := os.Open(theLab.Log("caddy"))
	if err != nil {
		return "", err
	}
	defer file.Close()
	for lines := bufio.NewReader(file); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return "", err
		}
		var entry struct {
			Msg     string
			UserID  string `json:"user_id"`
			Request struct{ URI string }
		}
		if json.Unmarshal(line, &entry) == nil && entry.Msg == "handled request" && entry.Request.URI == path {
			return entry.UserID, nil
		}
	}
}
