// SPDX-License-Identifier: Apache-2.0

package recordertest

import (
	"encoding/json"
	"net/http"

	"tailscale.com/sessionrecording"
)

// TakeEvents returns the events that have arrived since the last call.
func (r *Recorder) TakeEvents() []*sessionrecording.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.events
	r.events = nil
	return taken
}

// event receives an event. It rejects fields that are not in the format.
func (r *Recorder) event(w http.ResponseWriter, req *http.Request) {
	mode, ok := r.treat(w, req)
	switch {
	case !ok:
		return
	case mode == V1:
		w.WriteHeader(http.StatusNotFound)
		return
	}
	event := new(sessionrecording.Event)
	decoder := json.NewDecoder(req.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(event); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, event)
}
